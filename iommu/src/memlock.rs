//! The limit of locked memory, which pinned guest RAM counts against.
//!
//! Both of the kernel's interfaces charge what they pin: a Type1 container against the process, each
//! container anew, an iommufd against the user. Neither does for a process with `CAP_IPC_LOCK`.

use std::io;

use crate::HostPaths;
use crate::sys::{self, Limit};

/// `CAP_IPC_LOCK`. linux/capability.h
const CAP_IPC_LOCK: u32 = 14;

/// The limit of locked memory is too low, and could not be raised.
#[derive(Debug, thiserror::Error)]
#[error(
    "it needs {need} KiB of locked memory and the limit (RLIMIT_MEMLOCK) is {hard} KiB: set it to \
     {need} by `ulimit -l {need}` as root, LimitMEMLOCK={need}K in a systemd unit, or \
     `{user} hard memlock {need}` in /etc/security/limits.conf",
    need = self.need.div_ceil(1024),
    hard = self.hard / 1024,
)]
pub struct MemlockError {
    /// Bytes needed.
    pub need: u64,
    /// The hard limit, in bytes.
    pub hard: u64,
    /// The user it holds for.
    pub user: u32,
}

/// What this process has locked, and whether it is bound by the limit at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Locked {
    bytes: u64,
    exempt: bool,
}

/// Makes sure that `more` bytes can be pinned beside what is locked already, raising the limit where
/// this process may.
pub(crate) fn reserve(paths: &HostPaths, more: u64) -> Result<(), MemlockError> {
    let locked = locked(paths);
    if locked.exempt {
        return Ok(());
    }
    let Ok(limit) = sys::memlock_limit() else {
        return Ok(());
    };
    let need = locked.bytes.saturating_add(more);
    match raised(limit, need) {
        None => Ok(()),
        Some(wanted) => set(wanted).map_err(|_| MemlockError {
            need,
            hard: limit.hard,
            user: sys::effective_user(),
        }),
    }
}

fn set(limit: Limit) -> io::Result<()> {
    log::debug!("raising RLIMIT_MEMLOCK to {} bytes", limit.soft);
    sys::set_memlock_limit(limit)
}

/// Whether pinning `more` bytes fails for the limit alone: why ENOMEM came back.
pub(crate) fn explains(paths: &HostPaths, more: u64) -> Option<MemlockError> {
    let locked = locked(paths);
    let limit = sys::memlock_limit().ok()?;
    let need = locked.bytes.saturating_add(more);
    (!locked.exempt && need > limit.soft).then(|| MemlockError {
        need,
        hard: limit.hard,
        user: sys::effective_user(),
    })
}

/// The limit to set so that `need` bytes fit; nothing where they do.
const fn raised(limit: Limit, need: u64) -> Option<Limit> {
    if need <= limit.soft {
        None
    } else if need <= limit.hard {
        Some(Limit {
            soft: need,
            hard: limit.hard,
        })
    } else {
        Some(Limit {
            soft: need,
            hard: need,
        })
    }
}

fn locked(paths: &HostPaths) -> Locked {
    let read = |name: &str| {
        std::fs::read_to_string(paths.proc.join("self").join(name)).unwrap_or_default()
    };
    parse(&read("status"), &read("uid_map"))
}

/// A capability counts in the initial user namespace only: root of a container has it in vain. There
/// alone does `uid_map` map every id onto itself.
fn parse(status: &str, uid_map: &str) -> Locked {
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .map(str::trim)
    };
    let capabilities = field("CapEff")
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .unwrap_or(0);
    let initial = uid_map
        .split_whitespace()
        .eq(["0", "0", &u32::MAX.to_string()]);
    let kib = field("VmLck")
        .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    Locked {
        bytes: kib.saturating_mul(1024),
        exempt: initial && capabilities >> CAP_IPC_LOCK & 1 == 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INITIAL: &str = "         0          0 4294967295\n";

    #[test]
    fn root_is_exempt_and_the_root_of_a_container_is_not() {
        let status = "Name:\tbusway\nVmLck:\t     512 kB\nCapEff:\t000001ffffffffff\n";
        assert_eq!(
            parse(status, INITIAL),
            Locked {
                bytes: 512 << 10,
                exempt: true
            }
        );
        assert!(!parse(status, "0 100000 65536\n").exempt);
        assert!(!parse("CapEff:\t0000000000000000\n", INITIAL).exempt);
        assert_eq!(parse("", ""), Locked::default());
    }

    #[test]
    fn the_limit_is_raised_no_further_than_needed() {
        let limit = Limit { soft: 8, hard: 64 };
        assert_eq!(raised(limit, 8), None);
        assert_eq!(raised(limit, 64), Some(Limit { soft: 64, hard: 64 }));
        assert_eq!(raised(limit, 65), Some(Limit { soft: 65, hard: 65 }));
        let none = Limit {
            soft: u64::MAX,
            hard: u64::MAX,
        };
        assert_eq!(raised(none, u64::MAX), None);
    }

    #[test]
    fn the_error_gives_the_exact_figure() {
        let error = MemlockError {
            need: (4 << 30) + 1,
            hard: 8 << 20,
            user: 1000,
        };
        let text = error.to_string();
        assert!(
            text.contains("ulimit -l 4194305") && text.contains("is 8192 KiB"),
            "{text}"
        );
    }
}
