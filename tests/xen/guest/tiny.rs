//! A kernel for a PVH guest that does nothing but check its memory, round by round: what a clone does first that has
//! no page yet. Its code, its stack and its page tables are fetched like everything else; it reads, calls, overwrites and reads across
//! the ends of pages. Each round ends with a line on Xen's console:
//!
//! ```text
//! tiny: round 7 errors=0
//! ```
//!
//! After round [`SUSPEND_AFTER`] it suspends itself, as `xl save` would ask a guest with drivers to do, and goes on when it is resumed.
//! Built with plain `rustc`, by `tests/xen/run`.

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::ptr::{read_unaligned, read_volatile, write_volatile};

const PAGE: usize = 4096;
/// 4 MiB of the 32 that are mapped.
const DATA: usize = 16 << 20;
const DATA_PAGES: usize = 1024;
/// Pages with a small function each.
const CODE: usize = 24 << 20;
const CODE_PAGES: usize = 16;
const SUSPEND_AFTER: u64 = 2;
/// Between rounds, so that the console is not flooded: a quarter of a second at 2 GHz.
const PAUSE_CYCLES: u64 = 1 << 29;

// The entry of a PVH kernel: 32 bits, no paging. Maps the first 32 MiB by pages of 4 KiB and goes to long mode.
global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .long 4, 4, 18 // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start

    .section .start, "ax"
    .code32
    .globl start
start:
    cli
    cld
    mov $stack_end, %esp

    mov $page_tables, %edi
    mov $3, %eax
2:  mov %eax, (%edi)
    add $8, %edi
    add $0x1000, %eax
    cmp $0x2000003, %eax
    jne 2b

    mov $page_directory, %edi
    mov $page_tables + 3, %eax
3:  mov %eax, (%edi)
    add $8, %edi
    add $0x1000, %eax
    cmp $page_tables + 16 * 0x1000 + 3, %eax
    jne 3b
    movl $page_directory + 3, directory_pointers
    movl $directory_pointers + 3, root_table

    mov %cr4, %eax
    or $0x620, %eax // PAE, OSFXSR, OSXMMEXCPT
    mov %eax, %cr4
    mov $root_table, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx // EFER.LME
    rdmsr
    or $0x100, %eax
    wrmsr
    mov %cr0, %eax
    and $~4, %eax
    or $0x80000003, %eax // PG, MP, PE
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $8, $long_mode

    .code64
long_mode:
    xor %eax, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    call run
4:  hlt
    jmp 4b

    .balign 8
gdt:
    .quad 0, 0x00af9a000000ffff
gdt_pointer:
    .word 15
    .long gdt

    .bss
    .balign 4096
    .globl hypercall_page
hypercall_page: .skip 4096
root_table: .skip 4096
directory_pointers: .skip 4096
page_directory: .skip 4096
page_tables: .skip 16 * 4096
    .skip 16384
stack_end:
    .text
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static mut hypercall_page: [u8; PAGE];
}

#[unsafe(no_mangle)]
extern "C" fn run() -> ! {
    enable_hypercalls();
    for page in 0..CODE_PAGES {
        write_function(page);
    }
    for page in 0..DATA_PAGES {
        fill(page, 0);
    }
    for round in 1.. {
        say(round, check(round - 1));
        if round == SUSPEND_AFTER {
            suspend();
        }
        let until = cycles() + PAUSE_CYCLES;
        while cycles() < until {
            core::hint::spin_loop();
        }
    }
    unreachable!()
}

/// Checks every page, and overwrites each fourth without reading it: these hold the content of `generation` before, of the
/// next one afterwards.
fn check(generation: u64) -> u64 {
    let mut errors = 0;
    for page in 0..CODE_PAGES {
        errors += u64::from(call_function(page) != magic(page));
    }
    for page in 0..DATA_PAGES {
        let word_here = |index| word(page, generation_of(page, generation), index);
        match page % 4 {
            // The last bytes of this page and the first of the next with one load.
            0 if page + 1 < DATA_PAGES => {
                let next = word(page + 1, generation_of(page + 1, generation), 0);
                // SAFETY: eight bytes within the data.
                let both: u64 = unsafe { read_unaligned((DATA + (page + 1) * PAGE - 4) as *const u64) };
                errors += u64::from(both != word_here(511) >> 32 | next << 32);
            }
            1 => {
                // Written before anything of it is read, and put right again.
                let at = (DATA + page * PAGE + 56) as *mut u64;
                // SAFETY: a word within the data.
                unsafe {
                    write_volatile(at, !generation);
                    errors += u64::from(read_volatile(at) != !generation);
                    write_volatile(at, word_here(7));
                }
            }
            2 if generation % 2 == 0 => {
                fill(page, generation + 1);
                continue;
            }
            _ => {}
        }
        errors += (0..512).filter(|&index| read(page, index) != word_here(index)).count() as u64;
        if page % 4 == 2 {
            fill(page, generation + 1);
        }
    }
    errors
}

fn generation_of(page: usize, generation: u64) -> u64 {
    if page % 4 == 2 { generation } else { 0 }
}

fn word(page: usize, generation: u64, index: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (index as u64 + generation * 512).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

fn read(page: usize, index: usize) -> u64 {
    // SAFETY: a word within the data.
    unsafe { read_volatile((DATA + page * PAGE + index * 8) as *const u64) }
}

fn fill(page: usize, generation: u64) {
    for index in 0..512 {
        // SAFETY: a word within the data.
        unsafe { write_volatile((DATA + page * PAGE + index * 8) as *mut u64, word(page, generation, index)) };
    }
}

fn magic(page: usize) -> u32 {
    0x5eed_0000 + page as u32
}

/// `mov $magic, %eax; ret`, at an offset of its own.
fn function_at(page: usize) -> usize {
    CODE + page * PAGE + page * 128
}

fn write_function(page: usize) {
    let [a, b, c, d] = magic(page).to_le_bytes();
    for (index, byte) in [0xb8, a, b, c, d, 0xc3].into_iter().enumerate() {
        // SAFETY: within the pages kept for functions.
        unsafe { write_volatile((function_at(page) + index) as *mut u8, byte) };
    }
}

fn call_function(page: usize) -> u32 {
    let value;
    // SAFETY: `write_function` put a function there that changes nothing but eax.
    unsafe { asm!("call {}", in(reg) function_at(page), out("eax") value) };
    value
}

fn enable_hypercalls() {
    // SAFETY: Xen fills the page, which is kept for that.
    unsafe {
        let msr = core::arch::x86_64::__cpuid(0x4000_0002).ebx;
        asm!("wrmsr", in("ecx") msr, in("eax") &raw mut hypercall_page as u32, in("edx") 0);
    }
}

/// SCHEDOP_shutdown with SHUTDOWN_suspend; comes back when the domain, or a clone of it, is resumed.
fn suspend() {
    const SCHED_OP: usize = 29;
    let reason = 2u32;
    // SAFETY: the entries of the hypercall page are 32 bytes long; the hypercall reads `reason`.
    unsafe {
        asm!("call {}", in(reg) &raw mut hypercall_page as usize + SCHED_OP * 32, inout("rdi") 2u64 => _,
            inout("rsi") &reason => _, out("rax") _, out("rcx") _, out("r11") _);
    }
}

fn cycles() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

fn say(round: u64, errors: u64) {
    put_all(b"tiny: round ");
    put_number(round);
    put_all(b" errors=");
    put_number(errors);
    put(b'\n');
}

fn put_all(text: &[u8]) {
    text.iter().for_each(|&byte| put(byte));
}

fn put_number(number: u64) {
    if number >= 10 {
        put_number(number / 10);
    }
    put(b'0' + (number % 10) as u8);
}

/// To Xen's debug port, which makes lines on its console.
fn put(byte: u8) {
    // SAFETY: no memory is touched.
    unsafe { asm!("out 0xe9, al", in("al") byte) };
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    put_all(b"tiny: PANIC\n");
    loop {
        core::hint::spin_loop();
    }
}
