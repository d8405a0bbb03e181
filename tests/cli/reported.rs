//! What Busway tells on the hosts that people reported: `tests/cli/reported/HOST.txt` has the commands of each
//! and their answers. `SNAPSHOTS=overwrite` writes them anew, to be looked at.

use std::fmt::Write as _;
use std::path::Path;

use snapbox::{Data, assert_data_eq};

use super::fake_host::FakeHost;
use super::fake_host::library::REPORTED;
use super::{columns, device, examined};

/// What is asked of each host, in the order of [`REPORTED`].
const ASKED: [(&str, &[&str]); REPORTED.len()] = [
    (
        "blocks",
        &[
            "list",
            "check 01:00.0",
            "check 03:00.0",
            "check 04:00.0",
            "check 05:00.0",
            "check 06:00.0",
            "check 07:00.0",
            "bind 01:00.0 --dry-run",
            "bind 07:00.0 --dry-run",
        ],
    ),
    (
        "bootfb",
        &["list", "check c3:00.0 c3:00.1", "bind c3:00.0 --dry-run"],
    ),
    (
        "chipset",
        &["list", "check 00:1f.3", "check 00:02.0", "check 01:00.0"],
    ),
    ("dsa", &["list", "check 0a:00.0", "bind 0a:00.0"]),
    (
        "holders",
        &[
            "list",
            "check 01:00.0",
            "check 02:00.0",
            "check 03:00.0",
            "bind 01:00.0 --dry-run",
        ],
    ),
    (
        "hostile2",
        &[
            "list",
            "check 01:00.0",
            "check 02:00.0",
            "check 03:00.0",
            "check 04:00.0",
        ],
    ),
    ("huge", &["list", "check 01:00.0"]),
    (
        "mediated",
        &[
            "list",
            "list --tree",
            "list --svg -",
            "list --long 00:02.0",
            "list --long 83B8F4F2-509f-382f-3c1e-e6bfe0fa1001",
            "list --json 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            "check 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
            "check 83b8f4f2-509f-382f-3c1e-e6bfe0fa1002",
            "check 83b8f4f2-509f-382f-3c1e-e6bfe0fa1003",
            "check 83b8f4f2-509f-382f-3c1e-e6bfe0fa1004",
            "check a297db4a-f4c2-11e6-90f6-d3b88d6c9525 --json",
            "check 83b8f4f2-509f-382f-3c1e-e6bfe0fa1fff",
            "bind 83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        ],
    ),
    ("memlock", &["list", "check 01:00.0 --memory 4G"]),
    (
        "net",
        &[
            "list",
            "check 18:00.0",
            "check 18:00.1",
            "check 18:00.2",
            "check 19:00.0",
            "check 19:00.3",
            "bind 18:00.1 --dry-run",
            "bind 19:00.3 --dry-run",
        ],
    ),
    ("noiommu", &["list", "check 00:05.0", "check 00:06.0"]),
    (
        "pfvfio",
        &["list", "check 18:00.0", "check 18:02.0", "check 18:02.1"],
    ),
    (
        "pod-vf",
        &[
            "list",
            "check 18:01.1",
            "bind 18:01.1 --dry-run",
            "vfs 18:00.0 0 --dry-run",
        ],
    ),
    ("pve-off", &["list", "check 01:00.0", "check 00:1f.3"]),
    (
        "switchdev",
        &[
            "list",
            "check 81:00.0",
            "check 81:00.2",
            "bind 81:00.2 --dry-run",
        ],
    ),
    ("vmd", VMD),
    ("vmd-kernel", VMD),
    ("vmd-own-groups", VMD),
];

const VMD: &[&str] = &[
    "list",
    "check 00:0e.0",
    "check 10000:e1:00.0",
    "bind 00:0e.0 --dry-run",
    "bind 10000:e1:00.0 --dry-run",
];

#[test]
fn what_busway_tells_on_each_reported_host_is_what_was_read() {
    for ((name, _), (asked, commands)) in REPORTED.iter().zip(ASKED) {
        assert_eq!(*name, asked);
        let host = FakeHost::named(name);
        let mut shown = String::new();
        for words in commands {
            let (text, end) = device(&host, words, columns(100));
            writeln!(shown, "$ busway device {words}\n{text}").unwrap();
            if let Err(error) = end {
                writeln!(shown, "{error}\nexit status {}\n", error.exit_status()).unwrap();
            }
        }
        let (text, _) = examined(&host, "", columns(100));
        write!(shown, "$ busway doctor\n{text}").unwrap();
        // The made-up host's folder has another name each time.
        let root = host.path("");
        let shown = shown.replace(&*root.to_string_lossy(), "/");
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cli/reported");
        let path = folder.join(format!("{name}.txt"));
        assert_data_eq!(shown, Data::read_from(&path, None).raw());
    }
}

#[test]
fn what_is_mounted_deeper_is_unmounted_first_and_no_name_steers_the_terminal() {
    let host = FakeHost::described(
        "include base-intel\n\
         device 0000:01:00.0 144d:a80a class=010802 driver=nvme group=11\n  \
           disk nvme/nvme0/nvme0n1 259\n    \
             partition nvme0n1p1 mount=/mnt/a mount=/mnt/a/b\\040c\n    \
             partition nvme0n1p2 mount=/mnt/\u{202e}d\n",
    );
    let (text, _) = device(&host, "check 01:00.0", columns(100));
    assert!(text.contains("umount '/mnt/a/b c' /mnt/a\n"), "{text}");
    assert!(!text.contains('\u{202e}'), "{text}");
}
