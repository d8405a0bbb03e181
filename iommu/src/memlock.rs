//! The limit of locked memory, which pinned guest RAM counts against.
//!
//! The kernel's two interfaces charge differently. A Type1 container charges the process
//! (`VmLck`; drivers/vfio/vfio_iommu_type1.c), an iommufd the user, for all of whose processes one
//! limit holds (`locked_vm` of `struct user_struct`; drivers/iommu/iommufd/pages.c): what others
//! have pinned counts, and shows as `VmPin` of each. Neither charges a process with `CAP_IPC_LOCK`.

use std::fmt;
use std::io;
use std::path::Path;

use crate::SysRoot;
use crate::sys::{self, Limit};

/// No limit. RLIM_INFINITY, asm-generic/resource.h
const UNLIMITED: u64 = u64::MAX;

/// `CAP_IPC_LOCK`. linux/capability.h
const CAP_IPC_LOCK: u32 = 14;

/// Whom the kernel charges for what is pinned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accounting {
    /// The process: Type1.
    Process,
    /// The user: iommufd.
    User,
}

/// The limit of locked memory is too low, and could not be raised.
#[derive(Debug, thiserror::Error)]
#[error(
    "it needs {need} KiB of locked memory{others} and the limit (RLIMIT_MEMLOCK) is {limit} KiB{unseen}: \
     {remedy}",
    need = self.need.div_ceil(1024),
    limit = self.limit / 1024,
    others = Others(self),
    unseen = Unseen(self),
    remedy = Remedy(self),
)]
pub struct MemlockError {
    /// Bytes needed.
    pub need: u64,
    /// Bytes of them that other processes of this user have pinned, where those count.
    pub others: u64,
    /// The limit that is too low, in bytes.
    pub limit: u64,
    /// The user it holds for.
    pub user: u32,
}

impl MemlockError {
    /// Whether what can be seen from here fits: then it is what cannot that does not.
    const fn is_unseen(&self) -> bool {
        self.need <= self.limit
    }
}

struct Others<'a>(&'a MemlockError);

impl fmt::Display for Others<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.others / 1024 {
            0 => Ok(()),
            others => write!(
                f,
                " ({others} KiB of them for what user {}'s other processes have pinned, which \
                 iommufd counts too)",
                self.0.user
            ),
        }
    }
}

struct Unseen<'a>(&'a MemlockError);

impl fmt::Display for Unseen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.is_unseen() {
            return Ok(());
        }
        write!(
            f,
            "; what processes of user {} that cannot be seen from here (of other containers, or hidden \
             by /proc's hidepid) have pinned counts, too, which iommufd holds against it",
            self.0.user
        )
    }
}

struct Remedy<'a>(&'a MemlockError);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MemlockError { need, user, .. } = *self.0;
        if self.0.is_unseen() {
            return write!(
                f,
                "lift it by `ulimit -l unlimited` as root, LimitMEMLOCK=infinity in a systemd unit, or \
                 `{user} hard memlock unlimited` in /etc/security/limits.conf"
            );
        }
        let need = need.div_ceil(1024);
        write!(
            f,
            "set it to {need} by `ulimit -l {need}` as root, LimitMEMLOCK={need}K in a systemd unit, or \
             `{user} hard memlock {need}` in /etc/security/limits.conf"
        )
    }
}

/// What is locked already, and whether this process is bound by the limit at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Locked {
    /// By this process.
    own: u64,
    /// By other processes, where those count.
    others: u64,
    exempt: bool,
}

impl Locked {
    /// What locking `more` bytes needs.
    fn with(self, more: u64, limit: u64) -> MemlockError {
        MemlockError {
            need: self.own.saturating_add(self.others).saturating_add(more),
            others: self.others,
            limit,
            user: sys::effective_user(),
        }
    }
}

/// Makes sure that `more` bytes can be pinned beside what is locked already, raising the limit where
/// this process may.
///
/// A process's own limit need be no higher than what it locks. A user's is another matter: what all of
/// the user's processes have pinned is compared with the limit of the one that pins, at that moment
/// (drivers/iommu/iommufd/pages.c, incr_user_locked_vm). By then that may be more than now, and more
/// than can be seen, so the limit is raised as far as it goes.
pub(crate) fn reserve(
    paths: &SysRoot,
    accounting: Accounting,
    more: u64,
) -> Result<(), MemlockError> {
    let locked = locked(paths, accounting);
    if locked.exempt {
        return Ok(());
    }
    let limit = sys::memlock_limit();
    let needs = locked.with(more, limit.hard);
    let highest = match accounting {
        Accounting::Process => needs.need,
        Accounting::User => UNLIMITED,
    };
    if set(limit, raised(limit, highest)).is_ok() {
        return Ok(());
    }
    let _ = set(limit, raised(limit, limit.hard));
    // What others have pinned is an estimate: not everything that shows is charged to the user. Where
    // it alone is too much, the kernel decides.
    match needs.need.saturating_sub(needs.others) > limit.hard {
        true => Err(needs),
        false => Ok(()),
    }
}

fn set(limit: Limit, wanted: Limit) -> io::Result<()> {
    if wanted == limit {
        return Ok(());
    }
    log::debug!("raising RLIMIT_MEMLOCK to {} bytes", wanted.soft);
    sys::set_memlock_limit(wanted)
}

/// Why ENOMEM came back for `more` bytes, where it is for the limit: what is seen does not fit; or a
/// user's limit counts, against which more may be pinned than can be seen.
pub(crate) fn explains(paths: &SysRoot, accounting: Accounting, more: u64) -> Option<MemlockError> {
    let limit = sys::memlock_limit();
    explained(locked(paths, accounting), accounting, limit, more)
}

fn explained(
    locked: Locked,
    accounting: Accounting,
    limit: Limit,
    more: u64,
) -> Option<MemlockError> {
    let needs = locked.with(more, limit.soft);
    let may_be_unseen = accounting == Accounting::User && limit.soft != UNLIMITED;
    (!locked.exempt && (!needs.is_unseen() || may_be_unseen)).then_some(needs)
}

/// The limit with room for `bytes`.
fn raised(limit: Limit, bytes: u64) -> Limit {
    Limit {
        soft: limit.soft.max(bytes),
        hard: limit.hard.max(bytes),
    }
}

fn locked(paths: &SysRoot, accounting: Accounting) -> Locked {
    let read = |of: &Path, name: &str| std::fs::read_to_string(of.join(name)).unwrap_or_default();
    let own = paths.proc.join("self");
    let status = Status::parse(&read(&own, "status"));
    let exempt = status.may_lock && paths.is_in_initial_user_namespace();
    if accounting == Accounting::Process || exempt {
        return Locked {
            own: status.locked,
            others: 0,
            exempt,
        };
    }
    let others = std::fs::read_dir(&paths.proc)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .map(|entry| Status::parse(&read(&entry.path(), "status")))
        .filter(|other| other.user == status.user && other.id != status.id && !other.may_lock)
        .fold(0_u64, |sum, other| sum.saturating_add(other.pinned));
    Locked {
        own: status.pinned,
        others,
        exempt,
    }
}

/// What `/proc/PID/status` says of a process. proc_pid_status(5)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Status {
    id: Option<u32>,
    /// The real user.
    user: Option<u32>,
    /// `VmLck`, in bytes.
    locked: u64,
    /// `VmPin`, in bytes.
    pinned: u64,
    /// It has `CAP_IPC_LOCK`, in whatever user namespace.
    may_lock: bool,
}

impl Status {
    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let rest = status
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            rest.split_whitespace().next()
        };
        let bytes = |name| {
            field(name)
                .and_then(|kib| kib.parse::<u64>().ok())
                .unwrap_or(0)
                .saturating_mul(1024)
        };
        let capabilities = field("CapEff")
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .unwrap_or(0);
        Self {
            id: field("Pid").and_then(|id| id.parse().ok()),
            user: field("Uid").and_then(|id| id.parse().ok()),
            locked: bytes("VmLck"),
            pinned: bytes("VmPin"),
            may_lock: capabilities >> CAP_IPC_LOCK & 1 == 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const INITIAL: &str = "         0          0 4294967295\n";

    /// A host with this process (101), and others: id, user, VmPin in KiB, CapEff.
    fn host(
        uid_map: &str,
        capabilities: &str,
        others: &[(u32, u32, u64, &str)],
    ) -> (tempfile::TempDir, SysRoot) {
        let root = tempfile::tempdir().unwrap();
        let paths = SysRoot {
            proc: root.path().to_owned(),
            ..SysRoot::default()
        };
        let process = |name: &str, id: u32, user: u32, pinned: u64, capabilities: &str| {
            fs::create_dir_all(paths.proc.join(name)).unwrap();
            let text = format!(
                "Name:\tx\nPid:\t{id}\nUid:\t{user}\t{user}\t{user}\t{user}\n\
                 VmLck:\t     512 kB\nVmPin:\t     {pinned} kB\nCapEff:\t{capabilities}\n"
            );
            fs::write(paths.proc.join(name).join("status"), text).unwrap();
        };
        for name in ["self", "101"] {
            process(name, 101, 1000, 4, capabilities);
        }
        fs::write(paths.proc.join("self/uid_map"), uid_map).unwrap();
        for &(id, user, pinned, capabilities) in others {
            process(&id.to_string(), id, user, pinned, capabilities);
        }
        (root, paths)
    }

    #[test]
    fn root_is_exempt_and_the_root_of_a_container_is_not() {
        const ALL: &str = "000001ffffffffff";
        let exempt = |uid_map, capabilities| {
            let (_root, paths) = host(uid_map, capabilities, &[]);
            locked(&paths, Accounting::User).exempt
        };
        assert!(exempt(INITIAL, ALL));
        assert!(!exempt("0 100000 65536\n", ALL));
        assert!(!exempt(INITIAL, "0000000000000000"));
        let (_root, without_namespaces) = host(INITIAL, ALL, &[]);
        fs::remove_file(without_namespaces.proc.join("self/uid_map")).unwrap();
        assert!(locked(&without_namespaces, Accounting::User).exempt);
        assert_eq!(Status::parse("nonsense"), Status::default());
    }

    #[test]
    fn a_container_counts_the_process_and_an_iommufd_what_the_user_has_pinned() {
        let others = [
            (200, 1000, 64, "0"),
            (201, 1001, 128, "0"),
            (202, 1000, 256, "ffffffffff"),
        ];
        let (_root, paths) = host(INITIAL, "0", &others);
        let of = |accounting| {
            let locked = locked(&paths, accounting);
            (locked.own >> 10, locked.others >> 10)
        };
        assert_eq!(of(Accounting::Process), (512, 0));
        assert_eq!(of(Accounting::User), (4, 64));
    }

    #[test]
    fn a_process_s_limit_is_raised_as_needed_and_a_user_s_as_far_as_it_goes() {
        let limit = Limit { soft: 8, hard: 64 };
        assert_eq!(raised(limit, 8), limit);
        assert_eq!(raised(limit, 64), Limit { soft: 64, hard: 64 });
        assert_eq!(raised(limit, 65), Limit { soft: 65, hard: 65 });

        let (_root, paths) = host(INITIAL, "0", &[]);
        let before = sys::memlock_limit();
        let low = Limit {
            soft: before.hard.min(64 << 10),
            hard: before.hard,
        };
        sys::set_memlock_limit(low).unwrap();
        // 512 KiB are locked already, which many a host forbids whoever runs this.
        if reserve(&paths, Accounting::Process, 0).is_ok() {
            let soft = sys::memlock_limit().soft;
            assert_eq!(soft, low.soft.max(512 << 10));
        }
        reserve(&paths, Accounting::User, 0).unwrap();
        let after = sys::memlock_limit();
        assert_eq!(after.soft, after.hard);
        assert!(after.hard >= before.hard);
    }

    #[test]
    fn a_user_s_limit_that_holds_what_is_seen_is_told_with_what_is_not() {
        let limit = |soft| Limit { soft, hard: soft };
        let (mut locked, both) = (Locked::default(), [Accounting::Process, Accounting::User]);
        for accounting in both {
            assert!(explained(locked, accounting, limit(UNLIMITED), 1 << 30).is_none());
            let error = explained(locked, accounting, limit(64 << 10), 65 << 10).unwrap();
            let text = error.to_string();
            assert!(
                text.contains("(RLIMIT_MEMLOCK) is 64 KiB: set it to 65"),
                "{text}"
            );
        }
        let [process, user] = both.map(|by| explained(locked, by, limit(1 << 30), 1 << 30));
        assert!(process.is_none());
        let text = user.unwrap().to_string();
        assert!(
            text.contains("is 1048576 KiB; ")
                && text.contains("that cannot be seen from here")
                && text.contains("LimitMEMLOCK=infinity"),
            "{text}"
        );
        locked.exempt = true;
        assert!(explained(locked, Accounting::User, limit(1 << 10), 1 << 30).is_none());
    }

    #[test]
    fn the_error_gives_the_exact_figure_and_whose_it_is() {
        let error = |others| MemlockError {
            need: (4 << 30) + 1,
            others,
            limit: 8 << 20,
            user: 1000,
        };
        let text = error(0).to_string();
        assert!(
            text.contains("ulimit -l 4194305") && text.contains("is 8192 KiB"),
            "{text}"
        );
        assert!(!text.contains("iommufd"), "{text}");
        let text = error(64 << 10).to_string();
        assert!(
            text.contains("(64 KiB of them for what user 1000's"),
            "{text}"
        );
    }
}
