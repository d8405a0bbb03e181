//! Terminals: raw mode, given back at any end of the process, and pseudo-terminals.
//!
//! Raw mode is taken back when its guard drops, when the process exits, when a thread panics, and on a
//! signal that ends the process. SIGKILL and a power cut cannot be caught: then `stty sane` (or `reset`)
//! gives the terminal back.

use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The terminal as it was, and its descriptor. Leaked, for a signal handler may read it at any time.
struct Saved {
    fd: OwnedFd,
    settings: Termios,
    handlers: [(libc::c_int, libc::sigaction); FATAL.len()],
}

/// What is to be restored; null where nothing is.
static SAVED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

/// The signals that end a process by default and may reach this one. SIGSYS is the filters', whose handler gives the terminal
/// back as well, and no thread may touch (`sandbox/violation.rs`).
const FATAL: [libc::c_int; 10] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGPIPE,
];

/// Raw mode of the process' terminal. Dropping it gives the terminal back.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// Puts the terminal `fd` into raw mode: each key reaches the guest, Ctrl-C among them. Output
    /// processing stays on, so that Busway's own messages keep their line ends.
    ///
    /// # Errors
    /// It is no terminal, another one is in raw mode already, or the process is in the background,
    /// where it may not touch it.
    pub(crate) fn enter(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::enter_with(fd, |raw| {
            let output = raw.output_modes;
            raw.make_raw();
            raw.output_modes = output;
        })
    }

    /// Has each key be read when it is pressed, and not shown. Those that make signals, such as Ctrl-C, go on to do so.
    ///
    /// # Errors
    /// As [`enter`](Self::enter)
    pub(crate) fn enter_for_keys(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::enter_with(fd, |keys| {
            keys.local_modes -= LocalModes::ICANON | LocalModes::ECHO;
        })
    }

    fn enter_with(fd: BorrowedFd<'_>, change: impl FnOnce(&mut Termios)) -> io::Result<Self> {
        if !in_foreground(fd) {
            return Err(io::Error::other(
                "the process is in the background of its terminal",
            ));
        }
        let fd = fd.try_clone_to_owned()?;
        let settings = tcgetattr(&fd)?;
        let mut changed = settings.clone();
        change(&mut changed);
        let saved = Box::into_raw(Box::new(Saved {
            fd,
            settings,
            handlers: FATAL.map(|signal| (signal, disposition(signal))),
        }));
        if SAVED
            .compare_exchange(ptr::null_mut(), saved, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            // SAFETY: `saved` came from `Box::into_raw` above and was not published.
            drop(unsafe { Box::from_raw(saved) });
            return Err(io::Error::other("a terminal is in raw mode already"));
        }
        let guard = Self(());
        // SAFETY: published pointers are never freed, so the reference lives as long as it is used.
        let saved = unsafe { &*saved };
        catch_the_end(saved);
        tcsetattr(&saved.fd, OptionalActions::Now, &changed)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back where it is in raw mode, for a signal's handler that ends the process.
pub(crate) fn give_back() {
    restore();
}

/// Gives the terminal back, once. Safe to call from a signal handler.
fn restore() {
    let saved = SAVED.swap(ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: the pointer is null or one that `enter` published; those are never freed.
    if let Some(saved) = unsafe { saved.as_ref() } {
        // Nothing can be done about a failure: the terminal is gone, or is not ours any more.
        let _ = tcsetattr(&saved.fd, OptionalActions::Now, &saved.settings);
    }
}

/// Sees to it that the process cannot end with the terminal in raw mode.
fn catch_the_end(saved: &Saved) {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| {
        // SAFETY: `restore_at_exit` is a function for the whole life of the process.
        unsafe { libc::atexit(restore_at_exit) };
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Before the message, so that it can be read.
            restore();
            hook(info);
        }));
    });
    for (signal, before) in &saved.handlers {
        let default = before.sa_sigaction == libc::SIG_DFL;
        // A fault's handler (the runtime's, for stack overflow) is chained; of the others only the
        // default is replaced, for whoever handles or ignores a signal also lives on.
        if !default && !is_fault(*signal) {
            continue;
        }
        // SAFETY: all-zero is a valid sigaction: default action, empty mask, no flags.
        let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
        let handler: extern "C" fn(_, _, _) = on_fatal_signal;
        action.sa_sigaction = handler as usize;
        // On the alternate stack, for the stack may be what is at an end.
        action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
        // SAFETY: `action` is valid, and its handler does only what a handler may: it swaps an atomic,
        // and calls tcsetattr (rustix's, which is the ioctl alone), sigaction and raise.
        unsafe { libc::sigaction(*signal, &action, ptr::null_mut()) };
    }
}

extern "C" fn restore_at_exit() {
    restore();
}

/// Gives the terminal back and lets the signal do what it would have done.
extern "C" fn on_fatal_signal(
    signal: libc::c_int,
    info: *const libc::siginfo_t,
    _context: *const libc::c_void,
) {
    let saved = SAVED.load(Ordering::Acquire);
    restore();
    // SAFETY: as in `restore`; `info` is the kernel's, for the handler was set with SA_SIGINFO. sigaction
    // and raise are async-signal-safe, and the action is one that the kernel gave for this signal, or
    // the default.
    unsafe {
        let mut before: libc::sigaction = MaybeUninit::zeroed().assume_init();
        // Positive codes are the kernel's own: the instruction faulted.
        if is_fault(signal) && (*info).si_code > 0 {
            if let Some(saved) = saved.as_ref() {
                for (number, action) in &saved.handlers {
                    if *number == signal {
                        before = *action;
                    }
                }
            }
            // It faults again, and whoever cares for that now hears of it.
            libc::sigaction(signal, &before, ptr::null_mut());
            return;
        }
        libc::sigaction(signal, &before, ptr::null_mut());
        // Blocked while this handler runs, so it is delivered when it returns.
        libc::raise(signal);
    }
}

/// The signals for which the runtime has a handler, which finds out about stack overflow.
fn is_fault(signal: libc::c_int) -> bool {
    matches!(signal, libc::SIGSEGV | libc::SIGBUS)
}

fn disposition(signal: libc::c_int) -> libc::sigaction {
    // SAFETY: all-zero is a valid sigaction, and the kernel fills it in.
    unsafe {
        let mut action = MaybeUninit::zeroed().assume_init();
        libc::sigaction(signal, ptr::null(), &mut action);
        action
    }
}

/// Whether the process may change the terminal `fd` without being stopped: it is in its foreground,
/// or the terminal does not control it.
fn in_foreground(fd: BorrowedFd<'_>) -> bool {
    match tcgetpgrp(fd) {
        Ok(foreground) => foreground == getpgrp(),
        // There is one, of another PID namespace: this process is in a jail.
        Err(Errno::OPNOTSUPP) => fs::read_to_string("/proc/self/stat")
            .is_ok_and(|stat| is_foreground_by(&stat) == Some(true)),
        Err(_) => true,
    }
}

/// What `/proc/self/stat` says: whether the process's group is the one in its terminal's foreground. proc_pid_stat(5), fields
/// `pgrp` and `tpgid`
fn is_foreground_by(stat: &str) -> Option<bool> {
    // A name may have spaces and parentheses in it; the state is behind it.
    let (_, after) = stat.rsplit_once(')')?;
    let mut fields = after.split_ascii_whitespace();
    let group = fields.nth(2)?;
    let foreground = fields.nth(2)?;
    Some(group == foreground)
}

/// A new pseudo-terminal.
#[derive(Debug)]
pub(crate) struct Pty {
    /// Busway's side.
    pub(crate) master: File,
    /// The user's side, in raw mode. Kept open: without anybody on it the master reads as hung up.
    pub(crate) slave: File,
    /// The device for users to open.
    pub(crate) path: PathBuf,
}

impl Pty {
    /// Makes one.
    ///
    /// # Errors
    /// The system has none left, or `/dev/pts` is not there.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        let mut raw = tcgetattr(&slave)?;
        raw.make_raw();
        tcsetattr(&slave, OptionalActions::Now, &raw)?;
        let path = fs::read_link(format!("/proc/self/fd/{}", slave.as_raw_fd()))?;
        Ok(Self {
            master: master.into(),
            slave: slave.into(),
            path,
        })
    }

    /// The same terminal once more: its input and output go where the other's go.
    ///
    /// # Errors
    /// fcntl(2), `F_DUPFD_CLOEXEC`
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            master: self.master.try_clone()?,
            slave: self.slave.try_clone()?,
            path: self.path.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;
    use std::process::{Child, Command, Stdio};

    use rustix::termios::InputModes;

    use super::*;

    const CHILD: &str = "BUSWAY_TEST_TERMINAL";

    /// Not a test of its own: the process that [`ends`] starts, with a terminal as standard input.
    #[test]
    fn child() {
        let Ok(end) = std::env::var(CHILD) else {
            return;
        };
        // Under nohup(1), and in the background of some shells, tests are started with these ignored.
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT] {
            // SAFETY: the default action runs no code of ours.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let raw = RawMode::enter(io::stdin().as_fd()).unwrap();
        assert!(
            RawMode::enter(io::stdin().as_fd()).is_err(),
            "one at a time"
        );
        println!("\nraw");
        let mut line = String::new();
        // The parent looks at the terminal, then closes the pipe or sends a signal.
        BufReader::new(File::open("/dev/fd/2").unwrap())
            .read_line(&mut line)
            .unwrap();
        match end.as_str() {
            "drop" => drop(raw),
            "panic" => panic!("on purpose"),
            "panic in a thread" => {
                let thread = std::thread::spawn(|| panic!("on purpose"));
                assert!(thread.join().is_err());
                std::mem::forget(raw);
                // SAFETY: ends the process without any clean-up, which is what is asked for.
                unsafe { libc::_exit(0) };
            }
            "exit" => std::process::exit(0),
            "abort" => std::process::abort(),
            "stack overflow" => overflow(0),
            other => panic!("what is {other}?"),
        }
    }

    #[expect(unconditional_recursion, reason = "that is what is tested")]
    fn overflow(depth: u64) {
        let frame = std::hint::black_box([depth; 128]);
        overflow(frame[0] + 1);
    }

    /// Runs [`child`] on a terminal, lets it end as `end` says once it is in raw mode, and checks that
    /// the terminal is then as it was before.
    fn ends(end: &str, act: impl FnOnce(&mut Child)) {
        let pty = Pty::open().unwrap();
        let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        let mut before = tcgetattr(&pty.slave).unwrap();
        before.local_modes |= cooked;
        before.input_modes |= InputModes::ICRNL;
        tcsetattr(&pty.slave, OptionalActions::Now, &before).unwrap();
        // Standard error is the child's second input: standard input is the terminal.
        let (hold, held) = io::pipe().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "devices::terminal::tests::child", "--nocapture"])
            .env(CHILD, end)
            .stdin(pty.slave.try_clone().unwrap())
            .stdout(Stdio::piped())
            .stderr(hold)
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut output = output.lines().map_while(Result::ok);
        assert!(output.any(|line| line == "raw"), "{end}: no raw mode");
        let raw = tcgetattr(&pty.slave).unwrap();
        assert!(!raw.local_modes.intersects(cooked));
        assert_eq!(raw.output_modes, before.output_modes);
        act(&mut child);
        drop(held);
        child.wait().unwrap();
        let after = tcgetattr(&pty.slave).unwrap();
        assert_eq!(after.local_modes, before.local_modes, "{end}");
        assert_eq!(after.input_modes, before.input_modes, "{end}");
    }

    #[test]
    fn the_foreground_is_told_by_the_numbers_that_the_host_has_for_it() {
        for (stat, expected) in [
            ("7 (a) (b) S 6 5 5 34816 5 0", Some(true)),
            ("7 (busway) S 6 5 5 34816 4 0", Some(false)),
            ("7 (busway) S 6 5 5 0 -1 0", Some(false)),
            ("7 (busway) S 6 5", None),
            ("", None),
        ] {
            assert_eq!(is_foreground_by(stat), expected, "{stat}");
        }
    }

    #[test]
    fn the_terminal_comes_back_however_the_process_ends() {
        for end in [
            "drop",
            "panic",
            "panic in a thread",
            "exit",
            "abort",
            "stack overflow",
        ] {
            ends(end, |_| {});
        }
    }

    #[test]
    fn the_terminal_comes_back_after_each_signal_that_ends_a_process() {
        use std::os::unix::process::ExitStatusExt;
        for signal in FATAL {
            // Rust's runtime ignores this one.
            if signal == libc::SIGPIPE {
                continue;
            }
            ends("drop", |child| {
                // SAFETY: the child is ours and has not been waited for.
                assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
                assert_eq!(child.wait().unwrap().signal(), Some(signal));
            });
        }
    }
}
