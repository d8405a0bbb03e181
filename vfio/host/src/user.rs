//! The user whom a device's nodes are given to.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::device::HostDevice;
use super::root;
use super::root::SysRoot;

/// There is no such user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no user `{0}`: give a name or a number that `getent passwd` knows")]
pub struct NoUser(pub String);

/// A user's id by name or number.
///
/// # Errors
///
/// Where the name is unknown to the host.
pub fn user_id(root: &SysRoot, name: &str) -> Result<u32, NoUser> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let none = || NoUser(name.to_owned());
    if name.is_empty() || name.contains([':', '\n']) {
        return Err(none());
    }
    let local = fs::read_to_string(root.etc.join("passwd")).unwrap_or_default();
    let id = id_in(&local, name).or_else(|| {
        // A directory's users are not in the file.
        let output = Command::new("getent")
            .args(["passwd", "--", name])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        id_in(&String::from_utf8_lossy(&output.stdout), name)
    });
    id.ok_or_else(none)
}

/// `name:password:UID:GID:…` passwd(5)
fn id_in(text: &str, name: &str) -> Option<u32> {
    let fields = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut entries = fields.filter(|fields| fields.first() == Some(&name));
    entries.next()?.get(2)?.parse().ok()
}

/// The nodes that a process opens to use the device by VFIO: its group's and its own.
pub(super) fn nodes(root: &SysRoot, device: &HostDevice) -> Vec<PathBuf> {
    let vfio = root.dev.join("vfio");
    let group = device.group.map(|group| vfio.join(group.to_string()));
    let own = root::names(&root.device(device.address).join("vfio-dev"));
    let own = own.iter().map(|name| vfio.join("devices").join(name));
    group.into_iter().chain(own).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_found_by_name_and_number() {
        let folder = tempfile::tempdir().unwrap();
        let root = SysRoot::under(folder.path());
        fs::create_dir_all(&root.etc).unwrap();
        fs::write(
            root.etc.join("passwd"),
            "root:x:0:0::/:\nvmm:x:970:970::/:\n",
        )
        .unwrap();
        assert_eq!(user_id(&root, "vmm"), Ok(970));
        assert_eq!(user_id(&root, "4711"), Ok(4711));
        let unknown = user_id(&root, "nobody-of-this-name").unwrap_err();
        assert!(unknown.to_string().contains("`nobody-of-this-name`"));
    }
}
