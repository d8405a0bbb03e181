//! Which calls of the kernel's a thread of each kind makes: the one table that its filter is made of, and its
//! capabilities.
//!
//! A thread inherits the filters of the one that starts it. So the main thread's has what all others have, and a
//! vCPU's what those have that it starts when a driver begins. Where C libraries differ in the call that they make,
//! both forms are here.

use libc::{
    AF_INET, AF_NETLINK, AF_UNIX, AT_EMPTY_PATH, CLONE_FILES, CLONE_FS, CLONE_PTRACE,
    CLONE_SIGHAND, CLONE_THREAD, CLONE_UNTRACED, CLONE_VFORK, CLONE_VM, F_ADD_SEALS,
    F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_OFD_GETLK, F_OFD_SETLK, F_SETFD, F_SETFL, O_ACCMODE,
    O_APPEND, O_CREAT, O_TRUNC, PR_GET_NAME, PR_SET_NAME, PR_SET_NO_NEW_PRIVS, PROT_EXEC,
    SECCOMP_SET_MODE_FILTER, SIGSYS, c_long,
};
use rustix::thread::CapabilitySet;

use super::ioctls;
use super::kind::Kind;

/// When a call is made: which arguments it has. Arguments are counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// With any.
    Always,
    /// An argument is one of these, in its lower 32 bits.
    Is(u8, &'static [u32]),
    /// An argument has other lower 32 bits.
    IsNot(u8, u32),
    /// An argument has these of its bits: mask, value.
    Bits(u8, u32, u32),
    /// An argument is this process's number.
    IsThisProcess(u8),
}

use When::{Always, Bits, Is, IsNot, IsThisProcess};

/// A call, and when it is made.
pub(super) type Row = (c_long, When);

/// A namespace of any kind. linux/sched.h: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
const NAMESPACES: u32 = 0x7e02_0080;
/// What makes a thread of a new process's beginning.
const THREAD: u32 = (CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD) as u32;
const NO_THREAD: u32 = NAMESPACES | (CLONE_PTRACE | CLONE_UNTRACED | CLONE_VFORK) as u32;
/// What opening a file to be written, or making one, says at least one of.
const TO_WRITE: u32 = (O_ACCMODE | O_CREAT | O_TRUNC | O_APPEND) as u32;

/// What every thread does: it uses memory and locks, waits, reads and writes what is open, starts others, logs, gives
/// the terminal back and ends.
pub(super) const COMMON: &[Row] = &[
    (libc::SYS_read, Always),
    (libc::SYS_write, Always),
    (libc::SYS_readv, Always),
    (libc::SYS_writev, Always),
    (libc::SYS_close, Always),
    (libc::SYS_lseek, Always),
    (libc::SYS_futex, Always),
    (libc::SYS_ioctl, Is(1, ioctls::ANY)),
    (libc::SYS_ioctl, Is(1, ioctls::TERMINAL)),
    (
        libc::SYS_fcntl,
        Is(
            1,
            &[
                F_DUPFD_CLOEXEC as u32,
                F_GETFD as u32,
                F_SETFD as u32,
                F_GETFL as u32,
                F_SETFL as u32,
            ],
        ),
    ),
    // Of descriptors, which is fstat in either library's words.
    (libc::SYS_fstat, Always),
    (
        libc::SYS_newfstatat,
        Bits(3, AT_EMPTY_PATH as u32, AT_EMPTY_PATH as u32),
    ),
    (
        libc::SYS_statx,
        Bits(2, AT_EMPTY_PATH as u32, AT_EMPTY_PATH as u32),
    ),
    (libc::SYS_mmap, Bits(2, PROT_EXEC as u32, 0)),
    (libc::SYS_mprotect, Bits(2, PROT_EXEC as u32, 0)),
    (libc::SYS_munmap, Always),
    (libc::SYS_mremap, Always),
    (libc::SYS_madvise, Always),
    (libc::SYS_brk, Always),
    (libc::SYS_poll, Always),
    (libc::SYS_ppoll, Always),
    (libc::SYS_epoll_create1, Always),
    (libc::SYS_epoll_ctl, Always),
    (libc::SYS_epoll_wait, Always),
    (libc::SYS_epoll_pwait, Always),
    (libc::SYS_eventfd2, Always),
    (libc::SYS_clock_gettime, Always),
    (libc::SYS_clock_nanosleep, Always),
    (libc::SYS_nanosleep, Always),
    (libc::SYS_gettimeofday, Always),
    (libc::SYS_restart_syscall, Always),
    (libc::SYS_sched_yield, Always),
    // glibc's pthread_getattr_np, which a thread of Rust's begins with.
    (libc::SYS_sched_getaffinity, Always),
    (libc::SYS_getrandom, Always),
    (libc::SYS_gettid, Always),
    (libc::SYS_getpid, Always),
    // Whose a file is, and which limit was reached, is found out on whichever thread is refused something.
    (libc::SYS_geteuid, Always),
    (libc::SYS_prlimit64, Is(2, &[0])),
    (libc::SYS_clone, Bits(0, THREAD | NO_THREAD, THREAD)),
    // Answered with ENOSYS, for its flags are out of a filter's sight: libraries take clone instead.
    (libc::SYS_clone3, Always),
    (libc::SYS_set_robust_list, Always),
    (libc::SYS_rseq, Always),
    (libc::SYS_sigaltstack, Always),
    (libc::SYS_rt_sigprocmask, Always),
    (libc::SYS_rt_sigreturn, Always),
    // The handler of what a filter refuses stays.
    (libc::SYS_rt_sigaction, IsNot(0, SIGSYS as u32)),
    (libc::SYS_tgkill, IsThisProcess(0)),
    // What takes rights from the calling thread, as each does at its beginning.
    (
        libc::SYS_prctl,
        Is(
            0,
            &[
                PR_SET_NAME as u32,
                PR_GET_NAME as u32,
                PR_SET_NO_NEW_PRIVS as u32,
                PR_SET_VMA,
            ],
        ),
    ),
    (libc::SYS_seccomp, Is(0, &[SECCOMP_SET_MODE_FILTER])),
    (libc::SYS_landlock_create_ruleset, Always),
    (libc::SYS_landlock_restrict_self, Always),
    (libc::SYS_capget, Always),
    (libc::SYS_capset, Always),
    (libc::SYS_exit, Always),
    (libc::SYS_exit_group, Always),
];

/// linux/prctl.h
const PR_SCHED_CORE: u32 = 62;

/// Names for memory, which newer C libraries give to what they map. linux/prctl.h
const PR_SET_VMA: u32 = 0x5356_4d41;

/// Reads and writes at a place in a file: a device's regions, or its configuration space.
const AT_A_PLACE: &[Row] = &[(libc::SYS_pread64, Always), (libc::SYS_pwrite64, Always)];

/// Reads and writes at places in a disk's image, from several pieces of the guest's memory and to them.
const AT_PLACES: &[Row] = &[(libc::SYS_preadv, Always), (libc::SYS_pwritev, Always)];

/// Opens files to be read, looks at them and lists folders.
const TO_READ: &[Row] = &[
    (libc::SYS_open, Bits(1, TO_WRITE, 0)),
    (libc::SYS_openat, Bits(2, TO_WRITE, 0)),
    (libc::SYS_getdents64, Always),
];

/// Follows links, as sysfs has them from one thing to another.
const LINKS: &[Row] = &[(libc::SYS_readlink, Always), (libc::SYS_readlinkat, Always)];

/// Looks at files by their paths, in either library's words.
const LOOKS: &[Row] = &[
    (libc::SYS_stat, Always),
    (libc::SYS_lstat, Always),
    (libc::SYS_newfstatat, Always),
    (libc::SYS_statx, Always),
];

/// Writes to files that are there.
const IN_PLACE: &[Row] = &[(
    libc::SYS_openat,
    Bits(2, (O_CREAT | O_TRUNC | O_APPEND) as u32, 0),
)];

/// Makes and changes files, and gives them other names.
const TO_CHANGE: &[Row] = &[
    (libc::SYS_open, Always),
    (libc::SYS_openat, Always),
    (libc::SYS_rename, Always),
    (libc::SYS_ftruncate, Always),
];

/// Sets this process's limits.
const LIMITS: &[Row] = &[(libc::SYS_prlimit64, Is(0, &[0]))];

/// What is done with files besides, where a VM is put together and ends.
const TO_KEEP: &[Row] = &[
    (libc::SYS_linkat, Always),
    (libc::SYS_fchmod, Always),
    (libc::SYS_fsync, Always),
    (libc::SYS_flock, Always),
    (libc::SYS_fstatfs, Always),
    (libc::SYS_getcwd, Always),
];

/// Takes a file's name away: that of a socket that it served, or of what was not written whole.
const REMOVES: &[Row] = &[(libc::SYS_unlink, Always)];

/// Takes connections to a socket.
const ACCEPTS: &[Row] = &[(libc::SYS_accept4, Always)];

/// Hears what is said over a connection, says something, and ends it or half of it.
const HEARS: &[Row] = &[(libc::SYS_recvfrom, Always)];
const SAYS: &[Row] = &[(libc::SYS_sendto, Always)];
const ENDS: &[Row] = &[(libc::SYS_shutdown, Always)];

/// Signals a process by its descriptor, and waits for it. There is one that is held.
const OTHER_PROCESS: &[Row] = &[
    (libc::SYS_pidfd_send_signal, Always),
    (libc::SYS_waitid, Always),
];

/// Takes descriptors from the other end, and gives it some.
const TAKES: &[Row] = &[(libc::SYS_recvmsg, Always)];
const GIVES: &[Row] = &[(libc::SYS_sendmsg, Always)];

/// Bounds the time that a client has.
const TIMES: &[Row] = &[(libc::SYS_setsockopt, Always)];

/// Makes sockets: of the Unix family, of the Internet's to ask for the state of a tap, and of rtnetlink's to ask by which
/// interface the host is reached, for what is said of a device that cannot be had.
const SOCKETS: &[Row] = &[
    (
        libc::SYS_socket,
        Is(0, &[AF_UNIX as u32, AF_INET as u32, AF_NETLINK as u32]),
    ),
    (libc::SYS_socketpair, Is(0, &[AF_UNIX as u32])),
    (libc::SYS_bind, Always),
    (libc::SYS_listen, Always),
    // Of a socket that was inherited.
    (libc::SYS_getsockopt, Always),
    (libc::SYS_getsockname, Always),
];

/// Asks the kernel for routes, for what is said of a device that somebody asks about over the API.
const ROUTES: &[Row] = &[(libc::SYS_socket, Is(0, &[AF_NETLINK as u32]))];

/// Connects to another process.
const CONNECTS: &[Row] = &[
    (libc::SYS_socket, Is(0, &[AF_UNIX as u32])),
    (libc::SYS_connect, Always),
];

/// Makes two ends of a stream, of which another process gets one.
const PAIRS: &[Row] = &[(libc::SYS_socketpair, Is(0, &[AF_UNIX as u32]))];

/// What a disk's image is asked for besides.
const IMAGES: &[Row] = &[
    (libc::SYS_io_uring_enter, Always),
    (libc::SYS_io_uring_register, Always),
    (libc::SYS_fdatasync, Always),
    (libc::SYS_fallocate, Always),
    (libc::SYS_ftruncate, Always),
    (libc::SYS_ioctl, Is(1, ioctls::BLOCK_RUNNING)),
    // Its own processors: `queue_affinity=` of --disk.
    (libc::SYS_sched_setaffinity, Is(0, &[0])),
];

/// Opens a disk's image: its size, and the lock by which no other VM writes to it.
const IMAGES_OPENING: &[Row] = &[
    (
        libc::SYS_fcntl,
        Is(1, &[F_OFD_GETLK as u32, F_OFD_SETLK as u32]),
    ),
    (libc::SYS_ioctl, Is(1, ioctls::BLOCK_OPENING)),
];

/// Takes huge pages for RAM that comes, and gives them back.
const HUGE_BLOCKS: &[Row] = &[
    (libc::SYS_fallocate, Always),
    // The host's node that they are taken of: host_numa_node= of --memory-zone.
    (libc::SYS_set_mempolicy, Always),
];

/// Sets a timer that is there: of a limit, or of connections whose time is over.
const TIMERS: &[Row] = &[(libc::SYS_timerfd_settime, Always)];

/// What a start of a device's workers makes.
const WORKERS: &[Row] = &[
    (libc::SYS_io_uring_setup, Always),
    (libc::SYS_timerfd_create, Always),
];

/// What only putting together, opening and taking apart need.
const ONCE: &[Row] = &[
    (libc::SYS_memfd_create, Always),
    // Whose memory a zone of RAM is: host_numa_node= of --memory-zone.
    (libc::SYS_mbind, Always),
    // A terminal's input goes by one.
    (libc::SYS_pipe2, Always),
    (libc::SYS_signalfd4, Always),
    (libc::SYS_inotify_init1, Always),
    (libc::SYS_inotify_add_watch, Always),
    (libc::SYS_fcntl, Is(1, &[F_ADD_SEALS as u32])),
    // What may be on a core beside a VM's threads: --cpus core_scheduling=.
    (libc::SYS_prctl, Is(0, &[PR_SCHED_CORE])),
    // Any thread's processors, of this process and, as far as its user goes, of others: --cpus affinity= and dedicated=.
    (libc::SYS_sched_setaffinity, Always),
    // The process's layer of Landlock.
    (libc::SYS_landlock_add_rule, Always),
    (libc::SYS_getpgrp, Always),
];

const fn ioctl(requests: &'static [u32]) -> Row {
    (libc::SYS_ioctl, Is(1, requests))
}

const KVM_RUNNING: &[Row] = &[ioctl(ioctls::KVM_RUNNING)];
const KVM_PARKING: &[Row] = &[ioctl(ioctls::KVM_PARKING)];
const KVM_MAKING: &[Row] = &[ioctl(ioctls::KVM_MAKING)];
const VFIO_RUNNING: &[Row] = &[ioctl(ioctls::VFIO_RUNNING)];
const VFIO_MAPPING: &[Row] = &[ioctl(ioctls::VFIO_MAPPING)];
const VFIO_OPENING: &[Row] = &[ioctl(ioctls::VFIO_OPENING)];
const CLOSING: &[Row] = &[ioctl(ioctls::CLOSING)];
const VFIO_INTERRUPTS: &[Row] = &[ioctl(ioctls::VFIO_INTERRUPTS)];
const VHOST_RINGS: &[Row] = &[ioctl(ioctls::VHOST_RINGS)];
const VHOST_OPENING: &[Row] = &[ioctl(ioctls::VHOST_OPENING)];
const VHOST_CALLS: &[Row] = &[ioctl(ioctls::VHOST_CALLS)];
const TUN_RUNNING: &[Row] = &[ioctl(ioctls::TUN_RUNNING)];
const TUN_OPENING: &[Row] = &[ioctl(ioctls::TUN_OPENING)];
const PSEUDO_TERMINAL: &[Row] = &[ioctl(ioctls::PSEUDO_TERMINAL)];

/// Which a kind's threads make themselves, beside [`COMMON`].
pub(super) fn own(kind: Kind) -> &'static [&'static [Row]] {
    match kind {
        Kind::Main => &[
            TO_READ,
            LINKS,
            LOOKS,
            TO_CHANGE,
            REMOVES,
            TO_KEEP,
            LIMITS,
            SOCKETS,
            CONNECTS,
            ONCE,
            KVM_MAKING,
            VFIO_OPENING,
            TUN_OPENING,
            PSEUDO_TERMINAL,
            VHOST_OPENING,
            IMAGES_OPENING,
        ],
        Kind::Vcpu => &[
            KVM_RUNNING,
            KVM_PARKING,
            AT_A_PLACE,
            WORKERS,
            TIMERS,
            VFIO_RUNNING,
            CLOSING,
            VHOST_RINGS,
            TUN_RUNNING,
        ],
        Kind::Disk => &[AT_A_PLACE, AT_PLACES, IMAGES, TIMERS],
        Kind::Net => &[TUN_RUNNING],
        // It serves the queue by which a driver chooses offloads and queues.
        Kind::Vhost => &[VHOST_CALLS, TUN_RUNNING],
        Kind::Vsock => &[ACCEPTS, HEARS, SAYS, ENDS, TIMERS],
        Kind::VsockPorts => &[CONNECTS],
        // What a back end asks for comes by one end of a pair.
        Kind::VhostUser => &[ACCEPTS, HEARS, SAYS, TAKES, GIVES, ENDS, CONNECTS, PAIRS],
        Kind::Console => &[ACCEPTS, HEARS],
        // A balloon that waits for a mapping asks for it again after a while.
        Kind::Memory => &[VFIO_MAPPING, TIMERS, HUGE_BLOCKS],
        Kind::Http => &[
            TO_READ, LINKS, LOOKS, ACCEPTS, TAKES, SAYS, TIMES, ENDS, ROUTES,
        ],
        Kind::ConsoleOutput => &[LOOKS, TO_CHANGE, SAYS],
        Kind::Input => &[ACCEPTS, HEARS, REMOVES],
        Kind::Unmask => &[VFIO_INTERRUPTS],
        Kind::Variables => &[&[(libc::SYS_fdatasync, Always)]],
        // swtpm's half of a pair goes to it by a message.
        Kind::Tpm => &[CONNECTS, PAIRS, HEARS, SAYS, GIVES],
        Kind::Steer => &[TO_READ, LOOKS, IN_PLACE],
        Kind::Report => &[LOOKS, TO_CHANGE, REMOVES],
        Kind::GivenUp => &[LOOKS],
        Kind::Entropy => &[TIMERS],
        Kind::Supervisor => &[HEARS, OTHER_PROCESS],
        Kind::Log | Kind::Populate | Kind::Progress | Kind::Watchdog => &[],
    }
}

/// Kinds of threads that those of `kind` start while a guest runs: they have its filter, and one of their own.
pub(super) fn started_by(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Main => Kind::OF_VMS,
        Kind::Supervisor => &[],
        Kind::Vcpu => &[
            Kind::Disk,
            Kind::Net,
            Kind::Vhost,
            Kind::Vsock,
            Kind::Console,
            Kind::Entropy,
            Kind::Memory,
            Kind::Unmask,
            Kind::Watchdog,
        ],
        Kind::Disk => &[Kind::Disk, Kind::Watchdog],
        Kind::Http => &[Kind::Http, Kind::Watchdog],
        Kind::VhostUser => &[Kind::VhostUser, Kind::Watchdog],
        _ => &[Kind::Watchdog],
    }
}

/// All that a thread of a kind is allowed.
pub(super) fn allowed(kind: Kind) -> Vec<Row> {
    let others = started_by(kind).iter().copied();
    let kinds = std::iter::once(kind).chain(others.filter(|other| *other != kind));
    // What a vCPU does most often is looked for first.
    let first = KVM_RUNNING
        .iter()
        .filter(|_| matches!(kind, Kind::Main | Kind::Vcpu));
    let own = kinds.flat_map(|kind| own(kind).iter().copied().flatten());
    let mut rows: Vec<Row> = Vec::new();
    for row in first.chain(COMMON).chain(own) {
        if !rows.contains(row) {
            rows.push(*row);
        }
    }
    rows
}

/// Calls that a kind's threads may make and that come to nothing, with EACCES: paths have nothing for them. A few
/// messages are poorer for it, and nothing else is.
pub(super) fn refused(kind: Kind) -> Vec<Row> {
    let allowed = allowed(kind);
    // Where some files can be opened, asking for others is a violation.
    let is_allowed = |(call, when): &&Row| {
        let mut rows = allowed.iter();
        rows.any(|row| row.0 == *call && (row.1 == Always || *when == Always))
    };
    let rows = PATHS.iter().filter(|row| !is_allowed(row));
    rows.copied().collect()
}

/// Calls that look at a path, open it, or take its name away.
const PATHS: &[Row] = &[
    (libc::SYS_open, Always),
    (libc::SYS_openat, Always),
    (libc::SYS_stat, Always),
    (libc::SYS_lstat, Always),
    (libc::SYS_newfstatat, Bits(3, AT_EMPTY_PATH as u32, 0)),
    (libc::SYS_statx, Bits(2, AT_EMPTY_PATH as u32, 0)),
    (libc::SYS_readlink, Always),
    (libc::SYS_readlinkat, Always),
    (libc::SYS_access, Always),
    (libc::SYS_faccessat, Always),
    (libc::SYS_faccessat2, Always),
    (libc::SYS_unlink, Always),
    (libc::SYS_unlinkat, Always),
];

/// What of the process's files the threads of a kind may still reach by a path, under Landlock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Files {
    /// All that the process may.
    AsTheProcess,
    /// They are read, and folders listed.
    Read,
    /// The same, and those that are there are written.
    Change,
    /// They are removed.
    Remove,
    /// Unix sockets are connected to.
    Connect,
    /// None.
    None,
}

/// What the threads of a kind do with paths. A thread that another starts has the other's bounds as well.
pub(super) fn files(kind: Kind) -> Files {
    match kind {
        Kind::Main | Kind::Report | Kind::ConsoleOutput => Files::AsTheProcess,
        Kind::Steer => Files::Change,
        Kind::Http | Kind::GivenUp => Files::Read,
        Kind::Input => Files::Remove,
        Kind::VhostUser | Kind::VsockPorts | Kind::Tpm => Files::Connect,
        _ => Files::None,
    }
}

/// The capabilities that a kind's threads keep, of those that the process was started with. `docs/security.md` says
/// what for.
#[must_use]
pub fn capabilities(kind: Kind) -> CapabilitySet {
    match kind {
        Kind::Main => {
            CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::IPC_LOCK
                | CapabilitySet::NET_ADMIN
                | CapabilitySet::SYS_ADMIN
                | CapabilitySet::SYS_PTRACE
                | CapabilitySet::SYS_RESOURCE
        }
        Kind::Vcpu => CapabilitySet::IPC_LOCK,
        Kind::Populate | Kind::Memory => CapabilitySet::IPC_LOCK,
        Kind::Report | Kind::ConsoleOutput => CapabilitySet::DAC_OVERRIDE,
        Kind::VhostUser | Kind::VsockPorts | Kind::Input | Kind::Tpm => CapabilitySet::DAC_OVERRIDE,
        _ => CapabilitySet::empty(),
    }
}

/// A reason, the kinds (all, where there is none), and the rows.
#[cfg(test)]
type Reason = (&'static str, &'static [Kind], &'static [&'static [Row]]);

/// What is allowed though nothing was seen to make use of it, and why. `used.txt` has what was seen.
#[cfg(test)]
pub(super) const SPARE: &[Reason] = &[
    (
        "another C library's, or an older kernel's, form of what is seen",
        &[],
        &[&[
            (libc::SYS_fstat, Always),
            (libc::SYS_stat, Always),
            (libc::SYS_lstat, Always),
            (libc::SYS_newfstatat, Always),
            (libc::SYS_poll, Always),
            (libc::SYS_epoll_pwait, Always),
            (libc::SYS_nanosleep, Always),
            (libc::SYS_gettimeofday, Always),
            (libc::SYS_ioctl, Is(1, &[0x5451, 0x541b, 0x8004_5430])),
            (libc::SYS_prctl, Is(0, &[PR_SET_VMA])),
        ]],
    ),
    (
        "another C library's form of what is seen",
        &[Kind::Http, Kind::Steer, Kind::Report, Kind::ConsoleOutput],
        &[&[(libc::SYS_open, Always)]],
    ),
    (
        "the kernel's own, where a stop has interrupted a wait",
        &[],
        &[&[(libc::SYS_restart_syscall, Always)]],
    ),
    (
        "a terminal's: it is given back at any end, on whichever thread, in either library's words",
        &[],
        &[&[(libc::SYS_ioctl, Is(1, ioctls::TERMINAL))]],
    ),
    (
        "the thread's name, in the message on a violation, which ends the process",
        &[],
        &[&[(libc::SYS_prctl, Is(0, &[PR_GET_NAME as u32]))]],
    ),
    (
        "glibc's realpath(3), of a path that does not begin at the root",
        &[Kind::Main],
        &[&[(libc::SYS_getcwd, Always)]],
    ),
    (
        "an error's: what is said of a device that cannot be had, of a guest that has crashed, of a file that was not written",
        &[],
        &[&[
            (libc::SYS_socket, Is(0, &[AF_NETLINK as u32])),
            (libc::SYS_readlinkat, Always),
            (libc::SYS_ioctl, Is(1, &[0x8138_ae83])),
        ]],
    ),
    (
        "a report that was not written whole is taken away, and so is what is left of one",
        &[Kind::Report],
        &[&[(libc::SYS_unlink, Always), (libc::SYS_ftruncate, Always)]],
    ),
    (
        "a buffer that direct I/O cannot take: Linux's drivers have none",
        &[Kind::Disk],
        &[&[(libc::SYS_pread64, Always)]],
    ),
    (
        "a device is closed by who has it last: a vCPU, where it resets one that leaves meanwhile",
        &[Kind::Vcpu],
        &[CLOSING],
    ),
    (
        "the firmware's variables, which are made on the process's first thread",
        &[Kind::Main],
        &[&[(libc::SYS_linkat, Always), (libc::SYS_fsync, Always)]],
    ),
    (
        "an error's: who has locked a disk's image",
        &[Kind::Main],
        &[&[(libc::SYS_fcntl, Is(1, &[F_OFD_GETLK as u32]))]],
    ),
    (
        "imago's, where zeroes reach beyond the end of an image's file",
        &[Kind::Disk],
        &[&[(libc::SYS_ftruncate, Always)]],
    ),
    (
        "a back end that comes again to the socket where Busway listens, as dpdk-testpmd does",
        &[Kind::VhostUser],
        &[ACCEPTS],
    ),
    (
        "a driver that chooses other offloads while it runs: Linux's does for XDP",
        &[Kind::Net, Kind::Vhost],
        &[&[(libc::SYS_ioctl, Is(1, &[0x4004_54d0]))]],
    ),
    (
        "a driver that gives a queue another vector, or masks it, while it runs: Linux's does not",
        &[Kind::Vhost],
        &[VHOST_CALLS],
    ),
    (
        "F_SETFL: what libraries set of descriptors that they are given",
        &[],
        &[&[(libc::SYS_fcntl, Is(1, &[F_SETFL as u32]))]],
    ),
];
