//! What std lacks of the C library on x86-64 Linux.

use std::os::fd::AsRawFd;

pub const POLLIN: i16 = 1;
pub const MADV_DONTNEED: i32 = 4;
pub const RB_AUTOBOOT: i32 = 0x0123_4567;

const PROT_READ_WRITE: i32 = 3;
const MAP_SHARED: i32 = 1;
const MAP_PRIVATE: i32 = 2;
const MAP_ANONYMOUS: i32 = 0x20;
const MADV_HUGEPAGE: i32 = 14;
const WNOHANG: i32 = 1;

#[repr(C)]
pub struct PollFd {
    pub fd: i32,
    pub events: i16,
    pub revents: i16,
}

/// `struct termios`, 60 bytes, of which only the C library knows the fields.
#[repr(C)]
#[derive(Default)]
pub struct Termios([u32; 16]);

unsafe extern "C" {
    pub fn poll(fds: *mut PollFd, count: u64, timeout_ms: i32) -> i32;
    pub fn madvise(start: *mut u8, size: usize, advice: i32) -> i32;
    pub fn getrandom(buffer: *mut u8, size: usize, flags: u32) -> isize;
    pub fn reboot(command: i32) -> i32;
    pub fn tcgetattr(fd: i32, mode: *mut Termios) -> i32;
    pub fn tcsetattr(fd: i32, when: i32, mode: *const Termios) -> i32;
    pub fn cfmakeraw(mode: *mut Termios);
    fn mmap(start: *mut u8, size: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
    fn munmap(start: *mut u8, size: usize) -> i32;
    fn mount(source: *const u8, target: *const u8, kind: *const u8, flags: u64, data: *const u8) -> i32;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(code: i32) -> !;
    fn syscall(number: i64, ...) -> i64;
}

/// Fresh zeroed memory, shared with processes that are forked later or copied to them; in huge pages where it is large.
pub fn anonymous(size: usize, shared: bool) -> &'static mut [u8] {
    let flags = MAP_ANONYMOUS | if shared { MAP_SHARED } else { MAP_PRIVATE };
    // SAFETY: a new mapping of its own, which nobody else knows; advice does no harm.
    unsafe {
        let start = mmap(std::ptr::null_mut(), size, PROT_READ_WRITE, flags, -1, 0);
        assert!(start as isize != -1, "mmap of {size} bytes");
        madvise(start, size, MADV_HUGEPAGE);
        std::slice::from_raw_parts_mut(start, size)
    }
}

/// The same memory as words.
pub fn words_of(bytes: &'static mut [u8]) -> &'static mut [u64] {
    // SAFETY: any bytes are words.
    unsafe { bytes.align_to_mut().1 }
}

/// Gives memory of [`anonymous`] back.
pub fn unmap(words: &'static mut [u64]) {
    // SAFETY: a whole mapping, whose only reference ends here.
    unsafe { munmap(words.as_mut_ptr().cast(), size_of_val(words)) };
}

/// Mounts a file system that needs no device.
pub fn mount_at(target: &str, kind: &str, data: &str) {
    let [target, kind, data] = [target, kind, data].map(|text| format!("{text}\0"));
    std::fs::create_dir_all(target.trim_end_matches('\0')).expect("a directory to mount at");
    // SAFETY: strings that end in zero.
    let result = unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, data.as_ptr()) };
    assert_eq!(result, 0, "mount {kind}");
}

/// A copy of this process: zero in the copy, its number in the original.
pub fn fork_process() -> i32 {
    // SAFETY: no process here has a second thread.
    let pid = unsafe { fork() };
    assert!(pid >= 0, "fork");
    pid
}

/// Waits for a child's end; its exit status as the kernel writes it.
pub fn wait_for(pid: i32) -> i32 {
    let mut status = -1;
    // SAFETY: a place for the status.
    unsafe { waitpid(pid, &mut status, 0) };
    status
}

/// True when a child has ended.
pub fn has_ended(pid: i32) -> bool {
    let mut status = 0;
    // SAFETY: a place for the status.
    unsafe { waitpid(pid, &mut status, WNOHANG) != 0 }
}

/// Ends this process at once.
pub fn exit(code: i32) -> ! {
    // SAFETY: nothing of this process is needed any more.
    unsafe { _exit(code) }
}

/// Loads the kernel module in an open file, without parameters.
pub fn load_module(file: &std::fs::File) -> bool {
    const FINIT_MODULE: i64 = 313;
    // SAFETY: a file, a string that ends in zero, no flags.
    unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) == 0 }
}
