//! VMs that one process has one after the other.

use std::fs;

use serde_json::json;

use crate::attentive::attentive;
use crate::served::{Served, eventually};

/// Bytes of RAM of each.
const RAM: u64 = 80 << 20;

/// Bytes that a process has mapped, to be written, in pieces of which each could be a VM's RAM.
fn large(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let written = maps.lines().filter(|line| line.contains(" rw"));
    let sizes = written.map(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|place| u64::from_str_radix(place, 16).unwrap());
        end - start
    });
    sizes.filter(|size| *size >= RAM).sum()
}

#[test]
fn a_vm_that_is_deleted_leaves_no_memory_mapped() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let mut vm = served.vm(&attentive());
    vm["memory"]["size"] = json!(RAM);
    vm["disks"] = json!([{ "path": disk }]);
    vm["balloon"] = json!({ "size": 0 });
    vm["watchdog"] = json!(true);
    for _ in 0..4 {
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        assert_eq!(served.put("vm.boot"), 204);
        assert!(large(served.pid()) >= RAM);
        assert_eq!(served.put("vm.reboot"), 204);
        eventually("the guest runs again", || served.state() == "Running");
        assert_eq!(served.put("vm.delete"), 204);
    }
    // A thread that ends late has the last one's until the next VM.
    let left = large(served.pid());
    assert!(left <= RAM, "{left} bytes of RAM are mapped, of four VMs");
}
