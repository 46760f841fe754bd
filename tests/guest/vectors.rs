//! Do vector registers survive a page fault? Whoever brings the page runs on the same processor, and uses them too.

use std::arch::asm;

/// What is put into the vector registers, 32 bytes each, and what is found in them.
#[repr(align(32))]
struct Registers([[u8; 32]; 16]);

/// Reads a byte of memory while every vector register holds a pattern made of `seed`; false when one of them has changed.
/// Of processors without AVX only the lower halves are looked at.
pub fn survive_reading(byte: &u8, seed: u64) -> bool {
    let mut before = Registers([[0; 32]; 16]);
    for (index, byte) in before.0.as_flattened_mut().iter_mut().enumerate() {
        *byte = seed as u8 ^ (index % 251) as u8;
    }
    let mut after = Registers([[0; 32]; 16]);
    if is_x86_feature_detected!("avx") {
        // SAFETY: the processor has these registers.
        unsafe { read_holding_ymm(byte, &before, &mut after) };
        before.0 == after.0
    } else {
        read_holding_xmm(byte, &before, &mut after);
        before.0.iter().zip(&after.0).all(|(before, after)| before[..16] == after[..16])
    }
}

macro_rules! read_holding {
    ($move:literal, $register:literal, $byte:ident, $before:ident, $after:ident) => {
        asm!(
            ".irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            concat!($move, " ", $register, "\\number, [{before} + 32*\\number]"),
            ".endr",
            "mov {read}, byte ptr [{byte}]",
            ".irp number, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            concat!($move, " [{after} + 32*\\number], ", $register, "\\number"),
            ".endr",
            before = in(reg) $before, after = in(reg) $after, byte = in(reg) $byte, read = out(reg_byte) _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
            out("xmm14") _, out("xmm15") _, options(nostack, preserves_flags)
        )
    };
}

#[target_feature(enable = "avx")]
fn read_holding_ymm(byte: &u8, before: &Registers, after: &mut Registers) {
    // SAFETY: reads `byte` and `before` and writes `after`, within their bounds.
    unsafe { read_holding!("vmovdqu", "ymm", byte, before, after) };
}

fn read_holding_xmm(byte: &u8, before: &Registers, after: &mut Registers) {
    // SAFETY: reads `byte` and `before` and writes `after`, within their bounds.
    unsafe { read_holding!("movdqu", "xmm", byte, before, after) };
}
