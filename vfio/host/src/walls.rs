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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

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
