//! What a person reads when a thread makes a call that its filter has not.
//!
//! The kernel sends the thread a signal instead of doing the call (`SECCOMP_RET_TRAP`). Its handler says which call it
//! was, gives the terminal back, and ends the process.

use std::ffi::{CStr, c_int, c_void};
use std::io::{self, Write as _};
use std::os::fd::BorrowedFd;

use vmm_sys_util::signal::register_signal_handler;

use crate::arch::system_calls;
use crate::devices::terminal::give_back;
use crate::exit::RUNTIME;

/// Has violations be told of from now on.
///
/// # Errors
/// sigaction(2)
pub(super) fn tell_of() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_violation).map_err(io::Error::from)
}

/// Where `siginfo_t` has the call's number, an `int`. sigaction(2), `si_syscall`; asm-generic/siginfo.h, `_sigsys`
const CALL_NUMBER: usize = 24;

/// Ends the process. It does only what a signal's handler may: it makes calls of the kernel's, and puts a text
/// together on its stack.
extern "C" fn on_violation(_signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives the handler a `siginfo_t`, which has an aligned int there for this signal.
    let number = unsafe { info.byte_add(CALL_NUMBER).cast::<c_int>().read() };
    // SAFETY: the handler was set with SA_SIGINFO, and this is its third argument.
    let arguments = unsafe { system_calls::arguments(context) };
    give_back();
    let mut text = [0; 640];
    let length = write_message(&mut text, number.into(), arguments);
    // SAFETY: whoever has closed standard error gets EBADF, or nobody the message.
    let stderr = unsafe { BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
    let _unread = rustix::io::write(stderr, text.get(..length).unwrap_or_default());
    // SAFETY: it ends the process where it stands, without what is done at other exits.
    unsafe { libc::_exit(RUNTIME.into()) };
}

/// Puts the message into `text`, and gives its length.
fn write_message(text: &mut [u8], number: i64, arguments: [u64; 2]) -> usize {
    let size = text.len();
    let mut rest = text;
    // PR_GET_NAME writes 16 bytes at most, with a zero at the end. PR_GET_NAME(2const)
    let mut name = [0; 16];
    // SAFETY: there are so many bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    let [first, second] = arguments;
    // What does not fit is left out.
    let _cut = writeln!(
        rest,
        "busway: error: thread {} asked the kernel for call {number} ({}), with {first:#x} as its first argument and \
         {second:#x} as its second, which its filter does not have: the process ends. It is a bug in Busway, or \
         somebody has taken the thread over; --seccomp log lets such calls pass and has the kernel log them, \
         --seccomp false has no filters",
        name.to_str().unwrap_or("?"),
        system_calls::call_name(number).unwrap_or("unknown"),
    );
    size - rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_names_thread_call_and_first_argument() {
        let mut text = [0; 640];
        let thread = std::thread::Builder::new().name("_disk0".to_owned());
        let write = move || {
            let length = write_message(&mut text, libc::SYS_execve, [0x7f00, 0x40]);
            String::from_utf8(text[..length].to_vec()).unwrap()
        };
        let message = thread.spawn(write).unwrap().join().unwrap();
        let begins = "busway: error: thread _disk0 asked the kernel for call 59 (execve), with 0x7f00 as its first";
        assert!(message.starts_with(begins), "{message}");
        assert!(
            message.contains("and 0x40 as its second, which"),
            "{message}"
        );
        assert!(
            message.ends_with("--seccomp false has no filters\n"),
            "{message}"
        );
    }
}
