//! RAM that a VM is to have more of, beside a guest that has no driver for it.

use serde_json::{Value, json};

use crate::attentive::attentive;
use crate::served::Served;

const MIB: u64 = 1 << 20;
/// Of the guests of these tests.
const FIRST: u64 = 64 * MIB;
const MORE: u64 = 256 * MIB;

fn resize(served: &Served, bytes: u64) -> (u16, String) {
    let body = json!({ "desired_ram": bytes });
    let (status, why) = served.ask("PUT", "vm.resize", Some(&body));
    (status, why.to_string())
}

/// What is wanted beside what the guest began with, and what it has in all.
fn wanted(served: &Served) -> (Value, Value) {
    let (_, mut info) = served.ask("GET", "vm.info", None);
    (
        info["config"]["memory"]["hotplugged_size"].take(),
        info["memory_actual_size"].take(),
    )
}

#[test]
fn a_size_is_wanted_at_once_and_had_by_nobody_without_a_driver_and_what_cannot_be_is_refused() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&attentive());
    vm["memory"] = json!({
        "size": FIRST, "hotplug_size": MORE, "hotplug_method": "VirtioMem",
    });
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    assert_eq!(wanted(&served), (Value::Null, json!(FIRST)));
    for (bytes, words) in [
        (FIRST - 2 * MIB, "started with"),
        (FIRST + MORE + 2 * MIB, "hotplug_size"),
        (FIRST + 4096, "blocks of 2097152 bytes"),
        (u64::MAX, "hotplug_size"),
        (0, "started with"),
    ] {
        let (status, why) = resize(&served, bytes);
        assert!(
            status == 400 && why.contains(words),
            "{bytes}: {status} {why}"
        );
    }
    for bytes in [FIRST + 2 * MIB, FIRST + MORE, FIRST, FIRST + 128 * MIB] {
        assert_eq!(resize(&served, bytes).0, 204);
        // What is nothing is not said.
        let more = Some(bytes - FIRST).filter(|more| *more > 0);
        assert_eq!(wanted(&served), (json!(more), json!(FIRST)));
    }
    // Paused as well, and what is wanted stays over a restart and another boot.
    assert_eq!(served.put("vm.pause"), 204);
    assert_eq!(resize(&served, FIRST + 64 * MIB).0, 204);
    assert_eq!(served.put("vm.resume"), 204);
    assert_eq!(served.put("vm.reboot"), 204);
    assert_eq!(wanted(&served), (json!(64 * MIB), json!(FIRST)));
    assert_eq!(
        (served.put("vm.shutdown"), served.put("vm.boot")),
        (204, 204)
    );
    assert_eq!(wanted(&served).0, json!(64 * MIB));
    assert_eq!(served.put("vm.shutdown"), 204);
}

#[test]
fn a_vm_whose_ram_would_come_by_acpi_lives_as_ever_and_only_its_growth_is_refused() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&attentive());
    // As Kata Containers has it.
    vm["memory"] = json!({ "size": FIRST, "hotplug_size": MORE });
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    assert_eq!(resize(&served, FIRST).0, 204);
    let (status, why) = resize(&served, 2 * FIRST);
    assert!(status == 501 && why.contains("VirtioMem"), "{status} {why}");
    assert_eq!(wanted(&served), (Value::Null, json!(FIRST)));
    assert_eq!(served.put("vm.shutdown"), 204);
}
