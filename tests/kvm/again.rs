//! VMs that one process has one after the other.

use std::fs;

use serde_json::json;

use crate::attentive::attentive;
use crate::served::{Served, eventually};

/// How often something of this process is mapped, and how much address space it has in pages.
fn mapped(pid: u32) -> (usize, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let size = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages = size.split(' ').next().unwrap().parse().unwrap();
    (maps.lines().count(), pages)
}

#[test]
fn a_vm_that_is_deleted_leaves_no_memory_mapped() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut vm = served.vm(&attentive());
    vm["disks"] = json!([{ "path": disk }]);
    vm["balloon"] = json!({ "size": 0 });
    vm["watchdog"] = json!(true);
    let life = || {
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        assert_eq!(served.put("vm.boot"), 204);
        assert_eq!(served.put("vm.reboot"), 204);
        eventually("the guest runs again", || served.state() == "Running");
        assert_eq!(served.put("vm.delete"), 204);
        served.settle();
        mapped(served.pid())
    };
    // The first ones make what stays, such as what the allocator keeps.
    for _ in 0..4 {
        life();
    }
    let (before, pages) = life();
    for _ in 0..8 {
        life();
    }
    let (after, more) = life();
    assert!(
        after <= before + 4,
        "{before} mappings, and {after} after nine VMs"
    );
    // Of the guest's RAM of none of them.
    let ram = vm["memory"]["size"].as_u64().unwrap() / 4096;
    assert!(
        more < pages + ram,
        "{pages} pages, and {more} after nine VMs"
    );
}
