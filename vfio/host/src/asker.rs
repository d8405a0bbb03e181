//! Who asks: the user of this process, and what the kernel lets them do.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::root::{self, SysRoot};

/// linux/capability.h
const CAP_DAC_OVERRIDE: u32 = 1;
/// linux/capability.h
const CAP_DAC_READ_SEARCH: u32 = 2;
/// linux/capability.h
const CAP_SYS_PTRACE: u32 = 19;
/// linux/capability.h
const CAP_IPC_LOCK: u32 = 14;

/// The user of this process, as procfs tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Asker {
    /// Effective user.
    pub(super) user: u32,
    groups: Vec<u32>,
    capabilities: u64,
    /// Whether its capabilities count everywhere, or only in a container.
    is_initial: bool,
    /// The hard limit of locked memory in bytes; none: no limit.
    memlock: Option<u64>,
    /// The hard limit of open files; none: no limit.
    files: Option<u64>,
    /// The systemd service that this process is of.
    pub(super) service: Option<String>,
}

impl Asker {
    /// Reads `/proc/self`. What cannot be read is taken to be allowed.
    #[must_use]
    pub(super) fn read(root: &SysRoot) -> Self {
        let text = |name: &str| root::text(&root.proc.join("self").join(name)).unwrap_or_default();
        let status = text("status");
        let field = |name: &str| {
            let mut lines = status.lines();
            lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        };
        let ids = |name: &str| -> Vec<u32> {
            let words = field(name).unwrap_or_default().split_whitespace();
            words.filter_map(|word| word.parse().ok()).collect()
        };
        let limits = text("limits");
        let limit = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
            // Soft limit, hard limit, unit.
            line.split_whitespace().nth(1)?.parse().ok()
        };
        let mut groups = ids("Groups");
        groups.extend(ids("Gid").get(1));
        Self {
            user: ids("Uid").get(1).copied().unwrap_or(0),
            groups,
            capabilities: field("CapEff")
                .and_then(|digits| u64::from_str_radix(digits.trim(), 16).ok())
                .unwrap_or(u64::MAX),
            is_initial: root.is_in_initial_user_namespace(),
            memlock: limit("Max locked memory"),
            files: limit("Max open files"),
            service: service(&text("cgroup")),
        }
    }

    /// Whether the mode of a file lets this user read and write it.
    #[must_use]
    pub(super) fn may_use(&self, file: &Path) -> bool {
        let Ok(meta) = fs::metadata(file) else {
            return true;
        };
        if self.capabilities >> CAP_DAC_OVERRIDE & 1 == 1 {
            return true;
        }
        let bits = if meta.uid() == self.user {
            meta.mode() >> 6
        } else if self.groups.contains(&meta.gid()) {
            meta.mode() >> 3
        } else {
            meta.mode()
        };
        bits & 0o6 == 0o6
    }

    /// The bytes that this process may lock; none: as many as there are.
    #[must_use]
    pub(super) fn may_lock(&self) -> Option<u64> {
        let exempt = self.is_initial && self.capabilities >> CAP_IPC_LOCK & 1 == 1;
        self.memlock.filter(|_| !exempt)
    }

    /// Whether this user may see what every process has open: listing another's folder in procfs takes
    /// one right, following its links another (fs/proc/fd.c).
    #[must_use]
    pub(super) fn may_see_files(&self) -> bool {
        let has = |capability: u32| self.capabilities >> capability & 1 == 1;
        let lists = has(CAP_DAC_OVERRIDE) || has(CAP_DAC_READ_SEARCH);
        self.is_initial && lists && has(CAP_SYS_PTRACE)
    }

    /// The files that this process may have open; none: as many as it likes.
    #[must_use]
    pub(super) fn may_open(&self) -> Option<u64> {
        self.files
    }
}

/// The systemd service that a process is of, by `/proc/PID/cgroup` (cgroups(7)), whose last folder is a
/// service, and not a session or a container (a scope). What a user's own service may have its manager's
/// service has to have: the first of the path.
fn service(cgroup: &str) -> Option<String> {
    let lines = cgroup.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        matches!(controllers, "" | "name=systemd").then_some(path)
    });
    let is_service = |name: &str| name.ends_with(".service");
    let mut paths = lines.filter(|path| path.rsplit('/').next().is_some_and(is_service));
    let path = paths.next()?;
    let mut names = path.split('/');
    names.find(|name| is_service(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(status: &str, uid_map: Option<&str>) -> Asker {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        let own = root.proc.join("self");
        fs::create_dir_all(&own).unwrap();
        fs::write(own.join("status"), status).unwrap();
        let limits = "Max locked memory         8388608              8388608              bytes\n";
        fs::write(own.join("limits"), limits).unwrap();
        if let Some(map) = uid_map {
            fs::write(own.join("uid_map"), map).unwrap();
        }
        Asker::read(&root)
    }

    #[test]
    fn a_service_is_told_from_a_session() {
        let of = |text| service(text);
        let service = |name: &str| Some(name.to_owned());
        assert_eq!(
            of("0::/system.slice/vm\\x2d1.service\n"),
            service("vm\\x2d1.service")
        );
        let own = "0::/user.slice/user-1000.slice/user@1000.service/app.slice/vm.service\n";
        assert_eq!(of(own), service("user@1000.service"));
        let older = "4:memory:/x.service\n1:name=systemd:/system.slice/a@b.service\n";
        assert_eq!(of(older), service("a@b.service"));
        for session in [
            "",
            "0::/",
            "nonsense",
            "0::/user.slice/user-1000.slice/session-3.scope\n",
            "0::/user.slice/user-1000.slice/user@1000.service/app.slice/xterm.scope\n",
        ] {
            assert_eq!(of(session), None, "{session}");
        }
    }

    #[test]
    fn root_may_lock_all_but_not_in_a_container_of_its_own_users() {
        let root = "Uid:\t0\t0\t0\t0\nCapEff:\t000001ffffffffff\n";
        let initial = "         0          0 4294967295\n";
        assert_eq!(asker(root, Some(initial)).may_lock(), None);
        assert_eq!(asker(root, None).may_lock(), None);
        assert_eq!(
            asker(root, Some("0 100000 65536\n")).may_lock(),
            Some(8 << 20)
        );
        let user = "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\n";
        assert_eq!(asker(user, Some(initial)).may_lock(), Some(8 << 20));
        assert_eq!(asker(user, Some(initial)).user, 1000);
    }
}
