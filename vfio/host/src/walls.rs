//! What the host's kernel has for keeping a VMM within bounds.

use super::finding::{Finding, Level, Remedy};
use super::root::{self, SysRoot};

/// Whether the kernel can bound a process to the files of its VM; nothing where it does not tell, as a container's does.
/// Documentation/admin-guide/LSM/index.rst
pub(super) fn landlock(root: &SysRoot) -> Option<Finding> {
    const TOPIC: &str = "landlock";
    let modules = root::text(&root.sys.join("kernel/security/lsm"))?;
    if modules.trim().split(',').any(|module| module == "landlock") {
        let text = "Landlock bounds each VM to its own files";
        return Some(Finding::new(Level::Fine, TOPIC, text));
    }
    let text = "the kernel has no Landlock: VMs are not bounded to their own files";
    let remedy = Remedy::words(
        "boot a kernel with CONFIG_SECURITY_LANDLOCK (Linux 5.13), and `landlock` among the modules of lsm= on its \
         command line",
    );
    Some(Finding::new(Level::Note, TOPIC, text).remedy(remedy))
}

/// What one thread of a core can learn of another's, as far as the kernel knows; nothing where it does not tell. What is
/// not mitigated at all is told under `errata`.
/// Documentation/ABI/testing/sysfs-devices-system-cpu, vulnerabilities
pub(super) fn leaks(root: &SysRoot) -> Option<Finding> {
    const TOPIC: &str = "leaks";
    let folder = root.sys.join("devices/system/cpu/vulnerabilities");
    let names = root::names(&folder);
    if names.is_empty() {
        return None;
    }
    let by_threads: Vec<&str> = names
        .iter()
        .filter(|name| {
            root::text(&folder.join(name)).is_some_and(|says| says.contains("SMT vulnerable"))
        })
        .map(|name| &**name)
        .collect();
    if by_threads.is_empty() {
        let text = "no known leak between the threads of a core is open";
        return Some(Finding::new(Level::Fine, TOPIC, text));
    }
    let text = format!(
        "a guest may learn what the host does on the same core, by {}",
        by_threads.join(", ")
    );
    let remedy = Remedy::words(
        "have each core run one thread: nosmt on the kernel's command line, or `off` in \
         /sys/devices/system/cpu/smt/control; VMs are kept apart from each other by --cpus core_scheduling=",
    );
    Some(Finding::new(Level::Note, TOPIC, text).remedy(remedy))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn leaks_between_threads_of_a_core_are_named_with_what_closes_them() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        assert!(leaks(&root).is_none());
        let known = root.sys.join("devices/system/cpu/vulnerabilities");
        fs::create_dir_all(&known).unwrap();
        let says = |name: &str, text: &str| fs::write(known.join(name), text).unwrap();
        says("meltdown", "Not affected\n");
        says(
            "l1tf",
            "Mitigation: PTE Inversion; VMX: conditional cache flushes, SMT disabled\n",
        );
        says("retbleed", "Vulnerable\n");
        let fine = leaks(&root).unwrap();
        assert_eq!((fine.level, fine.remedies.len()), (Level::Fine, 0));
        says("mds", "Mitigation: Clear CPU buffers; SMT vulnerable\n");
        let threads = leaks(&root).unwrap();
        assert_eq!((threads.level, threads.remedies.len()), (Level::Note, 1));
        assert!(threads.text.ends_with("by mds"), "{}", threads.text);
    }

    #[test]
    fn a_kernel_without_landlock_is_told_of_with_what_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        assert!(landlock(&root).is_none());
        let security = root.sys.join("kernel/security");
        fs::create_dir_all(&security).unwrap();
        for (modules, level) in [
            ("lockdown,capability,landlock,yama,apparmor", Level::Fine),
            ("capability,yama,notlandlock\n", Level::Note),
            ("landlock\n", Level::Fine),
        ] {
            fs::write(security.join("lsm"), modules).unwrap();
            let found = landlock(&root).unwrap();
            assert_eq!(found.level, level, "{modules}");
            assert_eq!(found.remedies.len(), usize::from(level == Level::Note));
        }
    }
}
