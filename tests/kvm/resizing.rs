//! RAM that a VM is to have more of: by virtio-mem, of all RAM and of each zone, beside a guest that has no driver for it, and
//! by ACPI.

use serde_json::{Value, json};

use crate::attentive::attentive;
use crate::served::Served;

const MIB: u64 = 1 << 20;
/// Of the guests of these tests.
const FIRST: u64 = 64 * MIB;
const MORE: u64 = 256 * MIB;
/// What comes by ACPI comes in such.
const BLOCK: u64 = 128 * MIB;

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

/// What is said of the guest's RAM, and what it has.
fn had(served: &Served) -> (Value, Value, Value, Value) {
    let (_, mut info) = served.ask("GET", "vm.info", None);
    let actual = info["memory_actual_size"].take();
    let memory = &mut info["config"]["memory"];
    (
        memory["size"].take(),
        memory["hotplug_size"].take(),
        memory["hotplugged_size"].take(),
        actual,
    )
}

#[test]
fn ram_comes_by_acpi_as_clients_ask_and_what_the_guest_has_stays_over_each_kind_of_start() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&attentive());
    // As Kata Containers has it, which reads in `size` what there is, and says any number of bytes of what can come.
    let said = 4 * BLOCK + 4096;
    vm["memory"] = json!({ "size": FIRST, "hotplug_size": said });
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let is = |bytes: u64| (json!(bytes), json!(said), Value::Null, json!(bytes));
    assert_eq!(had(&served), is(FIRST));
    assert_eq!(resize(&served, FIRST).0, 204);
    for (bytes, words) in [
        (2 * FIRST, "whole blocks of 134217728 bytes"),
        (FIRST - 4096, "hotplug_method=virtio-mem"),
        (FIRST + 5 * BLOCK, "hotplug_size"),
        (u64::MAX, "hotplug_size"),
    ] {
        let (status, why) = resize(&served, bytes);
        assert!(
            status == 400 && why.contains(words),
            "{bytes}: {status} {why}"
        );
    }
    assert_eq!(had(&served), is(FIRST));
    assert_eq!(resize(&served, FIRST + BLOCK).0, 204);
    assert_eq!(had(&served), is(FIRST + BLOCK));
    // Less than it has now is refused, and a guest that stands still has more as well.
    assert_eq!(resize(&served, FIRST).0, 400);
    assert_eq!(served.put("vm.pause"), 204);
    assert_eq!(resize(&served, FIRST + 3 * BLOCK).0, 204);
    assert_eq!(served.put("vm.resume"), 204);
    let now = is(FIRST + 3 * BLOCK);
    assert_eq!(had(&served), now);
    assert_eq!(served.put("vm.reboot"), 204);
    assert_eq!(had(&served), now);
    assert_eq!(
        (served.put("vm.shutdown"), served.put("vm.boot")),
        (204, 204)
    );
    assert_eq!(had(&served), now);
    // As much as was said once, whatever lives it had.
    assert_eq!(resize(&served, FIRST + 5 * BLOCK).0, 400);
    assert_eq!(resize(&served, FIRST + 4 * BLOCK).0, 204);
    assert_eq!(had(&served), is(FIRST + 4 * BLOCK));
    assert_eq!(served.put("vm.shutdown"), 204);
    // What is to be booted has what is asked for from its start on.
    assert_eq!(resize(&served, 2 * FIRST).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    assert_eq!(had(&served), is(2 * FIRST));
    assert_eq!(served.put("vm.shutdown"), 204);
}

fn resize_zone(served: &Served, id: &str, bytes: u64) -> (u16, String) {
    let body = json!({ "id": id, "desired_ram": bytes });
    let (status, why) = served.ask("PUT", "vm.resize-zone", Some(&body));
    (status, why.to_string())
}

/// What is said of all RAM, and what is wanted of each zone beside what it began with, and what the guest has of it.
fn zones(served: &Served) -> (Value, Vec<(Value, Value)>) {
    let (_, mut info) = served.ask("GET", "vm.info", None);
    let memory = &mut info["config"]["memory"];
    let size = memory["size"].take();
    let zones = memory["zones"].as_array_mut().expect("zones");
    let of = |zone: &mut Value| (zone["hotplugged_size"].take(), zone["actual_size"].take());
    (size, zones.iter_mut().map(of).collect())
}

#[test]
fn each_zone_is_asked_for_by_itself_and_what_is_wanted_of_it_stays_over_each_kind_of_start() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&attentive());
    vm["cpus"] = json!({ "boot_vcpus": 1 });
    vm["memory"] = json!({
        "size": 0, "hotplug_method": "VirtioMem", "zones": [
            { "id": "near", "size": FIRST, "hotplug_size": MORE },
            { "id": "far", "size": FIRST, "hotplug_size": BLOCK, "hotplugged_size": BLOCK },
            { "id": "fixed", "size": FIRST },
        ],
    });
    vm["numa"] = json!([
        { "guest_numa_id": 0, "cpus": [0], "memory_zones": ["near", "fixed"] },
        { "guest_numa_id": 1, "memory_zones": ["far"] },
    ]);
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    // Before the first boot it is said what the guest begins with.
    assert_eq!(resize_zone(&served, "near", FIRST + 2 * MIB).0, 204);
    assert_eq!(resize_zone(&served, "nowhere", FIRST).0, 404);
    assert_eq!(resize_zone(&served, "near", FIRST + MIB).0, 400);
    assert_eq!(served.put("vm.boot"), 204);
    let is = |near: u64, far: u64| {
        let wanted = |more: u64| Some(more).filter(|more| *more > 0);
        let zones = vec![
            (json!(wanted(near)), json!(FIRST)),
            (json!(far), json!(FIRST)),
            (Value::Null, Value::Null),
        ];
        (json!(3 * FIRST), zones)
    };
    assert_eq!(zones(&served), is(2 * MIB, BLOCK));
    for (id, bytes, status, words) in [
        ("near", FIRST - 2 * MIB, 400, "67108864 to 335544320"),
        ("near", FIRST + MORE + 2 * MIB, 400, "67108864 to 335544320"),
        ("near", FIRST + 4096, 400, "blocks of 2097152 bytes"),
        ("far", u64::MAX, 400, "hotplug_size="),
        ("far", 0, 400, "zone `far`"),
        ("fixed", 2 * FIRST, 400, "memory.zones.hotplug_size"),
        ("nowhere", FIRST, 404, "only `near`, `far`, `fixed`"),
        ("", FIRST, 404, "no memory zone ``"),
    ] {
        let (said, why) = resize_zone(&served, id, bytes);
        assert!(said == status && why.contains(words), "{id}: {said} {why}");
    }
    let (status, why) = resize(&served, 4 * FIRST);
    assert!(status == 400 && why.contains("vm.resize-zone"), "{why}");
    assert_eq!(resize(&served, 3 * FIRST).0, 204);
    assert_eq!(zones(&served), is(2 * MIB, BLOCK));
    // One is nothing to the other, and a zone of a size that stays can be asked for that.
    assert_eq!(resize_zone(&served, "near", FIRST + MORE).0, 204);
    assert_eq!(resize_zone(&served, "fixed", FIRST).0, 204);
    assert_eq!(zones(&served), is(MORE, BLOCK));
    let (_, counters) = served.ask("GET", "vm.counters", None);
    for (name, requested, region) in [
        ("__memory-near", MORE, MORE),
        ("__memory-far", BLOCK, BLOCK),
    ] {
        let of = &counters[name];
        assert_eq!(of["requested_bytes"], requested, "{counters}");
        assert_eq!(of["plugged_bytes"], 0);
        assert_eq!(of["region_bytes"], region);
    }
    // Paused as well, and what is wanted stays over a restart and another boot.
    assert_eq!(served.put("vm.pause"), 204);
    assert_eq!(resize_zone(&served, "far", FIRST + 64 * MIB).0, 204);
    assert_eq!(served.put("vm.resume"), 204);
    assert_eq!(served.put("vm.reboot"), 204);
    assert_eq!(zones(&served), is(MORE, 64 * MIB));
    assert_eq!(
        (served.put("vm.shutdown"), served.put("vm.boot")),
        (204, 204)
    );
    assert_eq!(zones(&served), is(MORE, 64 * MIB));
    assert_eq!(served.put("vm.shutdown"), 204);
    // What is shown of a VM can be asked for.
    let (_, info) = served.ask("GET", "vm.info", None);
    assert_eq!(served.put("vm.delete"), 204);
    let again = served.ask("PUT", "vm.create", Some(&info["config"]));
    assert_eq!(again.0, 204, "{}", again.1);
    assert_eq!(zones(&served).0, json!(3 * FIRST));
}

#[test]
fn what_comes_beside_zones_by_acpi_leaves_their_sum_what_ram_is_said_to_be() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&attentive());
    vm["memory"] = json!({
        "hotplug_size": 2 * BLOCK,
        "zones": [{ "id": "a", "size": FIRST }, { "id": "b", "size": FIRST }],
    });
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let is = |more: Value, bytes: u64| (json!(2 * FIRST), json!(2 * BLOCK), more, json!(bytes));
    assert_eq!(had(&served), is(Value::Null, 2 * FIRST));
    assert_eq!(resize(&served, 2 * FIRST + BLOCK).0, 204);
    assert_eq!(had(&served), is(json!(BLOCK), 2 * FIRST + BLOCK));
    assert_eq!(
        (served.put("vm.shutdown"), served.put("vm.boot")),
        (204, 204)
    );
    assert_eq!(had(&served), is(json!(BLOCK), 2 * FIRST + BLOCK));
    assert_eq!(served.put("vm.shutdown"), 204);
    assert_eq!(resize(&served, 2 * FIRST + 2 * BLOCK).0, 204);
    assert_eq!(resize(&served, FIRST).0, 400);
    assert_eq!(served.put("vm.boot"), 204);
    assert_eq!(had(&served), is(json!(2 * BLOCK), 2 * FIRST + 2 * BLOCK));
    assert_eq!(served.put("vm.shutdown"), 204);
}
