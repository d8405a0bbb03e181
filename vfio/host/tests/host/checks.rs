//! What a check says, that its advice can be followed, and that binding agrees with it.

use std::collections::BTreeSet;

use busway_host::{Called, CalledError, Check, Level};

use super::fake_host::library::REPORTED;
use super::*;

fn checked(host: &FakeHost, addresses: &[Bdf]) -> Check {
    let addresses = addresses.iter().copied().collect();
    let host = Host::read(&host.root).unwrap();
    Check::of(&host, &addresses, 0, &|_| Ok(()))
}

/// The topics of what stands against giving a device away.
fn obstacles(check: &Check) -> Vec<&'static str> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let obstacles = findings.filter(|finding| finding.level == Level::Obstacle);
    obstacles.map(|finding| finding.topic).collect()
}

/// The devices that the advice says to bind.
fn advised(check: &Check) -> Vec<Vec<Bdf>> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let commands = findings.flat_map(|finding| &finding.remedies);
    let commands = commands.filter_map(|remedy| remedy.command.as_ref().map(ToString::to_string));
    commands
        .filter_map(|command| {
            let words = command.strip_prefix("busway device bind ")?;
            Some(words.split(' ').map(at).collect())
        })
        .collect()
}

/// The devices that the advice says to take from drivers by hand, and these.
fn unbound(check: &Check) -> BTreeSet<(String, String)> {
    let findings = check.devices.iter().flat_map(|device| &device.findings);
    let commands = findings.flat_map(|finding| &finding.remedies);
    let commands = commands.filter_map(|remedy| remedy.command.as_ref().map(ToString::to_string));
    commands
        .filter_map(|command| {
            let words = command.strip_prefix("echo ")?;
            let (address, attribute) = words.split_once(" > /sys/bus/pci/drivers/")?;
            let driver = attribute.strip_suffix("/unbind")?;
            Some((address.to_owned(), driver.to_owned()))
        })
        .collect()
}

#[test]
fn whoever_follows_the_advice_to_bind_has_devices_that_are_bound_and_whole_groups() {
    // What else stands against a device has remedies of its own.
    let only_binding = |topics: Vec<&str>| topics.iter().all(|t| matches!(*t, "group" | "driver"));
    let mut followed = 0;
    // The hostile one contradicts itself.
    let hosts = HOSTS.iter().filter(|(name, _)| *name != "hostile");
    for (name, _) in hosts.chain(&REPORTED) {
        let host = FakeHost::named(name);
        let read = Host::read(&host.root).unwrap();
        let check = |asked: &[Bdf]| {
            let asked = asked.iter().copied().collect();
            Check::of(&read, &asked, 0, &|_| Ok(()))
        };
        let mut advices = BTreeSet::new();
        for device in read
            .devices()
            .filter(|d| d.group.is_some() && !d.is_bridge())
        {
            let check = check(&[device.address]);
            if only_binding(obstacles(&check)) {
                advices.extend(advised(&check));
            }
        }
        for addresses in advices {
            if !only_binding(obstacles(&check(&addresses))) {
                continue;
            }
            let host = FakeHost::named(name);
            let mut kernel = host.kernel();
            // A bridge is taken from its driver first.
            for (address, driver) in unbound(&check(&addresses)) {
                let attribute = format!("sys/bus/pci/drivers/{driver}/unbind");
                kernel.write(&host.path(&attribute), &address).unwrap();
            }
            bind(&host, &mut kernel, &addresses)
                .unwrap_or_else(|error| panic!("{name}, {addresses:?}: {error}"));
            // A user who may not open the nodes is told so then.
            let mut left = obstacles(&checked(&host, &addresses));
            left.retain(|topic| *topic != "nodes");
            assert!(left.is_empty(), "{name}, {addresses:?}: {left:?}");
            followed += 1;
        }
    }
    assert!(followed > 20, "{followed}");
}

const VMD: [&str; 2] = ["0000:00:0e.0", "10000:e1:00.0"];

#[test]
fn what_is_behind_a_volume_management_device_is_used_with_it_and_goes_with_it() {
    for name in ["vmd", "vmd-own-groups"] {
        let host = FakeHost::named(name);
        assert_eq!(uses(&host, VMD[0]), uses(&host, VMD[1]));
        assert_eq!(uses(&host, VMD[0])[1], "/ (nvme0n1p2)");
        // The switch for the group passes over nothing that is in use.
        let permits = Permits::from([busway_host::Permit::Group]);
        let read = Host::read(&host.root).unwrap();
        let refusals = busway_host::check_bind(&read, &[at(VMD[0])].into(), &permits);
        assert!(
            matches!(&refusals[..], [Refusal::InUse { uses, .. }] if uses.len() == 2),
            "{refusals:?}"
        );
    }
    // Its child is gone when it is taken: by either's name the advice is the same, and works.
    for asked in VMD {
        let host = FakeHost::named("vmd-kernel");
        let check = checked(&host, &[at(asked)]);
        let advised = advised(&check);
        assert!(!advised.is_empty() && advised.iter().all(|a| *a == [at(VMD[0])]));
        bind(&host, &mut host.kernel(), &[at(VMD[0])]).unwrap();
        assert!(obstacles(&checked(&host, &[at(VMD[0])])).is_empty());
        assert_eq!(obstacles(&checked(&host, &[at(VMD[1])])), ["device"]);
    }
    let host = FakeHost::named("vmd-kernel");
    let both = bind(&host, &mut host.kernel(), &VMD.map(at));
    let Err(BindError::Refused(refused)) = both else {
        panic!("{both:?}");
    };
    let (address, maker) = (at(VMD[1]), at(VMD[0]));
    assert_eq!(refused.0, [Refusal::EndsWith { address, maker }]);
}

#[test]
fn functions_that_the_chipset_works_by_are_never_advised_to_be_given_away() {
    let host = FakeHost::named("chipset");
    let check = checked(&host, &[at("0000:00:1f.3")]);
    assert!(advised(&check).is_empty());
    let text = format!("{check:?}");
    assert!(
        text.contains("0000:00:1f.0, 0000:00:1f.4, 0000:00:1f.5"),
        "{text}"
    );
    let refused = bind(&host, &mut host.kernel(), &[at("0000:00:1f.3")]);
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("functions of its chipset") && !text.contains("device bind"));
}

#[test]
fn bind_foresees_what_vfio_pci_turns_away() {
    let host = FakeHost::named("dsa");
    let bound = |host: &FakeHost| bind(host, &mut host.kernel(), &[at("0000:0a:00.0")]);
    let Err(BindError::Refused(refused)) = bound(&host) else {
        panic!("not refused");
    };
    let address = at("0000:0a:00.0");
    assert_eq!(refused.0, [Refusal::Denied { address }]);
    // Told to take it, as it runs or as it would be loaded.
    host.file("sys/module/vfio_pci/parameters/disable_denylist", "Y");
    assert!(matches!(bound(&host), Err(BindError::Undone { .. })));
    std::fs::remove_dir_all(host.path("sys/module/vfio_pci")).unwrap();
    assert!(matches!(bound(&host), Err(BindError::Refused(_))));
    let line = "options vfio-pci ids=1:2 disable_denylist=1";
    host.file("etc/modprobe.d/vfio.conf", line);
    assert!(matches!(bound(&host), Err(BindError::Undone { .. })));
}

#[test]
fn a_frame_buffer_of_the_console_and_a_want_of_an_iommu_stand_against_it() {
    let host = FakeHost::named("bootfb");
    let check = checked(&host, &[at("0000:c3:00.0")]);
    assert_eq!(obstacles(&check), ["display"]);
    assert!(format!("{check:?}").contains("BOOTFB, simpledrm"));
    let host = FakeHost::named("noiommu");
    for address in ["0000:00:05.0", "0000:00:06.0"] {
        let check = checked(&host, &[at(address)]);
        assert!(obstacles(&check).contains(&"group"));
        assert!(!format!("{check:?}").contains("allow_unsafe_interrupts"));
        let refused = bind(&host, &mut host.kernel(), &[at(address)]);
        assert!(matches!(refused, Err(BindError::Refused(_))));
    }
}

#[test]
fn a_token_is_told_of_where_vfio_has_the_physical_function() {
    let host = FakeHost::named("pfvfio");
    for address in ["0000:18:00.0", "0000:18:02.0", "0000:18:02.1"] {
        let text = format!("{:?}", checked(&host, &[at(address)]));
        assert!(text.contains(&format!("--device {address},vf_token=UUID")));
    }
}

#[test]
fn devices_are_found_by_what_people_call_them() {
    let find = |host: &FakeHost, text: &str| text.parse::<Called>().unwrap().find(&host.root);
    let host = FakeHost::named("chipset");
    for (text, address) in [
        ("eno1", "0000:00:1f.6"),
        ("/sys/class/net/eno1", "0000:00:1f.6"),
        ("/sys/class/block/nvme0n1p3", "0000:01:00.0"),
        ("nvme0n1", "0000:01:00.0"),
        ("pci_0000_01_00_0", "0000:01:00.0"),
        ("144D:a80c", "0000:01:00.0"),
        ("01:00.0", "0000:01:00.0"),
        ("77:00.0", "0000:77:00.0"),
    ] {
        assert_eq!(find(&host, text), Ok(at(address)), "{text}");
    }
    for text in [
        "vmbr0",
        "eno7",
        "1234:5678",
        "/sys/class/net",
        "/etc/passwd",
        "/sys/../etc",
    ] {
        let found = find(&host, text);
        assert_eq!(found, Err(CalledError::Nothing(text.to_owned())));
    }
    let nodes = FakeHost::described(
        "device 01:00.0 1002:73bf class=030000 driver=amdgpu
           class drm/card0 dri/card0
           class drm/renderD128 dri/renderD128
         device 02:00.0 144d:a80a class=010802 driver=nvme
           class nvme/nvme0 nvme0
         device 03:00.0 15b3:101d class=020000 driver=mlx5_core
           class infiniband/mlx5_0 infiniband/mlx5_0",
    );
    for node in ["dri/renderD128", "nvme0"] {
        nodes.file(&format!("dev/{node}"), "");
    }
    for (text, address) in [
        ("renderD128", "0000:01:00.0"),
        ("/dev/dri/renderD128", "0000:01:00.0"),
        ("/dev/nvme0", "0000:02:00.0"),
        ("nvme0", "0000:02:00.0"),
        ("mlx5_0", "0000:03:00.0"),
        ("PCI:3:0:0", "0000:03:00.0"),
        ("pci-0000:03:00.0", "0000:03:00.0"),
    ] {
        assert_eq!(find(&nodes, text), Ok(at(address)), "{text}");
    }
    assert_eq!(find(&FakeHost::named("vmd"), "e1:00.0"), Ok(at(VMD[1])));
    let found = find(&FakeHost::named("pfvfio"), "8086:154c");
    let devices = vec![at("0000:18:02.0"), at("0000:18:02.1")];
    let called = "8086:154c".to_owned();
    assert_eq!(found, Err(CalledError::Several { called, devices }));
}

#[test]
fn services_are_let_lock_memory_and_nothing_else_of_the_user_is_ended() {
    let remedy = |cgroup: &str| {
        let host = FakeHost::named("memlock");
        host.file("proc/self/cgroup", cgroup);
        let found = busway_host::examine(&host.root, 4 << 30, &|_| Ok(()));
        let memlock = found.into_iter().find(|finding| finding.topic == "memlock");
        let mut remedies = memlock.unwrap().remedies.into_iter();
        remedies.next().unwrap().to_string()
    };
    let text = remedy("0::/system.slice/busway-vm1.service\n");
    assert!(
        text.contains("/busway-vm1.service.d/memlock.conf"),
        "{text}"
    );
    assert!(
        text.ends_with("systemctl restart -- busway-vm1.service"),
        "{text}"
    );
    let text = remedy("0::/user.slice/user-7.slice/user@7.service/app.slice/vm.service\n");
    assert!(text.contains("/user@7.service.d/memlock.conf"), "{text}");
    assert!(text.ends_with("systemctl daemon-reload"), "{text}");
}

#[test]
fn what_check_and_bind_say_of_a_device_is_the_same_on_every_host() {
    // The rest is for the guest's start, and not for binding.
    let of_binding = ["device", "group", "use", "errata"];
    for (name, _) in HOSTS.iter().chain(&REPORTED) {
        let fake = FakeHost::named(name);
        let host = Host::read(&fake.root).unwrap();
        for device in host.devices().filter(|device| !device.is_with_vfio()) {
            let asked = [device.address].into();
            let check = Check::of(&host, &asked, 1 << 30, &|_| Ok(()));
            let findings = check.devices.into_iter().flat_map(|device| device.findings);
            let obstacles = findings.filter(|finding| finding.level == Level::Obstacle);
            let topics: Vec<_> = obstacles.map(|finding| finding.topic).collect();
            let refused = busway_host::check_bind(&host, &asked, &Permits::new());
            let stands = topics.iter().any(|topic| of_binding.contains(topic));
            let at = device.address;
            assert_eq!(
                stands,
                !refused.is_empty(),
                "{name} {at}: {topics:?} {refused:?}"
            );
        }
    }
}

#[test]
fn advice_comes_in_the_order_in_which_it_can_be_followed() {
    let host = FakeHost::described(
        "         device 0000:18:00.0 144d:a824 class=010802 driver=nvme group=40 reset=flr vfs=1/32
         device 0000:18:00.1 144d:a824 class=010802 driver=nvme group=41 pf=18:00.0#0
           disk nvme/nvme1/nvme1n1 260 mount=/srv",
    );
    let read = Host::read(&host.root).unwrap();
    let asked = [at("0000:18:00.0")].into();
    let text = busway_host::check_bind(&read, &asked, &Permits::new())[0].to_string();
    let (unmount, remove) = (text.find("umount /srv"), text.find("vfs 0000:18:00.0 0"));
    assert!(unmount.is_some() && unmount < remove, "{text}");
    let host = FakeHost::described(
        "         device 65:00.0 10de:2684 class=030000 driver=nouveau group=30 boot_vga
         device 65:00.1 10de:22ba class=040300 driver=snd_hda_intel group=30",
    );
    let text = format!("{:?}", checked(&host, &[at("0000:65:00.1")]));
    assert!(
        text.contains("free what is in use, then bind them together"),
        "{text}"
    );
}

#[test]
fn a_node_without_memory_is_told_from_one_that_is_not_there() {
    let host = FakeHost::named("huge");
    let reserve = |node| {
        let (mut kernel, mut tell) = (host.kernel(), |_: &_| ());
        let mut session = Session::new(&host.root, &mut kernel, &mut tell);
        busway_host::reserve_huge_pages(&mut session, Some(node), 2 << 20, 2 << 20)
    };
    let says = |node| reserve(node).unwrap_err().to_string();
    assert!(says(4).starts_with("NUMA node 4 has processors and no memory"));
    assert!(says(77).starts_with("this host has no NUMA node 77"));
    let found = busway_host::examine(&host.root, 0, &|_| Ok(()));
    let low = found
        .iter()
        .find(|f| f.text.starts_with("hardly any"))
        .unwrap();
    assert!(
        low.text.ends_with("0, 1, 2, 3, 8, 9, 10, 11"),
        "{}",
        low.text
    );
}

#[test]
fn vfio_pci_makes_virtual_functions_where_it_was_told_to() {
    let host = FakeHost::named("pfvfio");
    let make = || {
        let (mut kernel, mut tell) = (host.kernel(), |_: &_| ());
        let mut session = Session::new(&host.root, &mut kernel, &mut tell).dry_run(true);
        let options = busway_host::VfsOptions {
            count: Some(1),
            ..busway_host::VfsOptions::default()
        };
        busway_host::vfs(&mut session, at("0000:18:00.0"), &options)
    };
    make().unwrap();
    host.file("sys/module/vfio_pci/parameters/enable_sriov", "N");
    let error = make().unwrap_err().to_string();
    assert!(error.contains("its own driver is what makes"), "{error}");
}
