//! Moving devices on made-up hosts: whatever fails, and wherever it is killed, they can be put back.

mod fake_host;
mod kept;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use busway_host::{
    AtBoot, BindError, BindOptions, Kernel, Outcome, Permit, Permits, Persist, RestoreError,
    Session, Standing, Step, SysRoot, UnbindError,
};
use busway_pci::Bdf;
use fake_host::{FakeHost, FakeKernel, Spec};

fn at(address: &str) -> Bdf {
    address.parse().unwrap()
}

/// One of a group of two, the other of them, and a drive reserved for a driver that it is not with.
const DEVICES: [&str; 3] = ["0000:00:02.0", "0000:00:02.1", "0000:01:00.0"];

fn host() -> FakeHost {
    let mut host = FakeHost::new();
    host.device(&Spec::default());
    host.device(&Spec {
        address: DEVICES[1],
        driver: Some("igb"),
        driver_override: Some("igb"),
        ..Spec::default()
    });
    host.device(&Spec {
        address: DEVICES[2],
        behind: "pci0000:00/0000:00:01.0",
        vendor: 0x144d,
        device: 0xa808,
        class: 0x010802,
        group: Some(12),
        node: 0,
        driver: None,
        driver_override: Some("pci-stub"),
    });
    host.native(DEVICES[2], "nvme");
    host
}

/// All that a bind can be asked for.
fn everything() -> BindOptions {
    BindOptions {
        user: Some(4711),
        persist: Some(Persist {
            program: PathBuf::from("/usr/bin/busway"),
        }),
        ..BindOptions::default()
    }
}

fn with<T>(
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    change: impl FnOnce(&mut Session<'_>) -> T,
) -> T {
    let mut tell = |_: &_| ();
    change(&mut Session::new(root, kernel, &mut tell))
}

fn bind(host: &FakeHost, kernel: &mut FakeKernel, options: &BindOptions) -> Result<(), BindError> {
    let bind = |session: &mut Session<'_>| busway_host::bind(session, &DEVICES.map(at), options);
    with(&host.root, kernel, bind).map(drop)
}

fn unbind(host: &FakeHost, kernel: &mut FakeKernel) -> Result<(), UnbindError> {
    let none = Permits::new();
    let unbind = |session: &mut Session<'_>| busway_host::unbind(session, &DEVICES.map(at), &none);
    with(&host.root, kernel, unbind).map(drop)
}

fn restore(
    host: &FakeHost,
    kernel: &mut FakeKernel,
) -> Result<Vec<busway_host::Restored>, RestoreError> {
    let restore = |session: &mut Session<'_>| busway_host::restore(session, &[], &Permits::new());
    with(&host.root, kernel, restore)
}

/// All that is to be as it was.
type State = (
    BTreeMap<String, (Option<String>, String)>,
    BTreeMap<String, String>,
);

fn state(host: &FakeHost) -> State {
    (host.state(), host.traces())
}

/// How many requests a whole bind takes, with all that can be asked for.
const REQUESTS: usize = 1 // the module
    + 1 // the journal
    + 3 + 3 + 2 // override, detach and attach; the last has no driver to be taken from
    + 1 // the journal, with the nodes
    + 2 + 3 // two groups' nodes and three devices'
    + 3; // rules

#[test]
fn a_failure_of_any_write_leaves_everything_as_it_was() {
    let fails_at = |&number: &usize| {
        let host = host();
        let before = state(&host);
        let mut kernel = host.kernel();
        kernel.fails = Box::new(move |n, _| (n == number).then_some(libc::EINVAL));
        match bind(&host, &mut kernel, &everything()) {
            Ok(()) => false,
            Err(BindError::Undone { stranded, .. }) => {
                assert!(stranded.is_empty(), "{stranded:?}");
                assert_eq!(state(&host), before, "after {:#?}", kernel.log);
                true
            }
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!((0..).take_while(fails_at).count(), REQUESTS);
}

#[test]
fn killed_before_any_write_it_is_put_back_by_restore() {
    for number in 0..=REQUESTS {
        let host = host();
        let before = state(&host);
        let mut kernel = host.kernel();
        kernel.dies_at = Some(number);
        let bound = bind(&host, &mut kernel, &everything());
        assert_eq!(bound.is_ok(), number == REQUESTS);
        restore(&host, &mut host.kernel()).unwrap();
        assert_eq!(
            state(&host),
            before,
            "killed before request {number}: {:#?}",
            kernel.log
        );
    }
}

#[test]
fn a_restore_that_is_killed_is_finished_by_another() {
    for number in 0.. {
        let host = host();
        let before = state(&host);
        bind(&host, &mut host.kernel(), &everything()).unwrap();
        let mut kernel = host.kernel();
        kernel.dies_at = Some(number);
        let first = restore(&host, &mut kernel);
        restore(&host, &mut host.kernel()).unwrap();
        assert_eq!(
            state(&host),
            before,
            "killed before request {number}: {:#?}",
            kernel.log
        );
        if first.is_ok() {
            assert!(number > 10, "{number}");
            break;
        }
    }
}

#[test]
fn an_unbind_that_is_killed_is_finished_by_restore() {
    for number in 0.. {
        let host = host();
        bind(&host, &mut host.kernel(), &everything()).unwrap();
        let mut kernel = host.kernel();
        kernel.dies_at = Some(number);
        let first = unbind(&host, &mut kernel);
        restore(&host, &mut host.kernel()).unwrap();
        assert_eq!(
            host.traces(),
            BTreeMap::new(),
            "{number}: {:#?}",
            kernel.log
        );
        for (address, (driver, set)) in host.state() {
            assert!(
                !set.contains("vfio"),
                "{number}: {address} is reserved for {set}"
            );
            assert!(driver.as_deref() != Some("vfio-pci"), "{number}: {address}");
        }
        if first.is_ok() {
            assert!(number > 10, "{number}");
            break;
        }
    }
}

#[test]
fn an_interrupt_before_any_step_leaves_everything_as_it_was() {
    for number in 0.. {
        let host = host();
        let before = state(&host);
        let mut kernel = host.kernel();
        let asked = Cell::new(0);
        let stop = || {
            asked.set(asked.get() + 1);
            asked.get() > number
        };
        let mut tell = |_: &_| ();
        let mut session = Session::new(&host.root, &mut kernel, &mut tell).stop_when(&stop);
        match busway_host::bind(&mut session, &DEVICES.map(at), &everything()) {
            Ok(_) => {
                assert_eq!(number, REQUESTS);
                break;
            }
            Err(error) => {
                assert!(
                    error
                        .to_string()
                        .starts_with("interrupted, before it could"),
                    "{error}"
                );
                assert_eq!(state(&host), before, "{number}");
            }
        }
    }
}

#[test]
fn a_dry_run_tells_every_step_of_a_real_one_and_changes_nothing() {
    let told = |host: &FakeHost, dry| {
        let mut steps = Vec::new();
        let mut kernel = host.kernel();
        let mut tell = |step: &Step| steps.push(step.clone());
        let mut session = Session::new(&host.root, &mut kernel, &mut tell).dry_run(dry);
        busway_host::bind(&mut session, &DEVICES.map(at), &everything()).unwrap();
        (steps, kernel.log)
    };
    let host = host();
    let before = state(&host);
    let (dry, log) = told(&host, true);
    assert_eq!(state(&host), before);
    assert!(log.is_empty(), "{log:?}");
    let (real, _) = told(&host, false);
    // The journal is nobody's to write by hand, and the devices' own nodes get their names later.
    let by_hand = |step: &&Step| match step {
        Step::File { path, .. } => !path.ends_with("devices.json"),
        Step::Own { node, .. } => !node.parent().unwrap().ends_with("devices"),
        _ => true,
    };
    let real: Vec<_> = real.iter().filter(by_hand).cloned().collect();
    assert_eq!(dry, real);
}

#[test]
fn unbind_sets_an_earlier_override_again_and_restore_the_driver_too() {
    let host = host();
    let before = state(&host);
    bind(&host, &mut host.kernel(), &BindOptions::default()).unwrap();
    unbind(&host, &mut host.kernel()).unwrap();
    let state_then = host.state();
    let (driver, set) = &state_then[DEVICES[1]];
    assert_eq!((driver.as_deref(), set.as_str()), (Some("igb"), "igb"));
    // With its override, only that driver may take it, and it is not loaded.
    assert_eq!(state_then[DEVICES[2]], (None, "pci-stub".to_owned()));
    assert_eq!(state(&host), before);
}

#[test]
fn what_a_device_had_first_is_what_it_gets_after_two_binds() {
    let host = host();
    let before = state(&host);
    bind(&host, &mut host.kernel(), &BindOptions::default()).unwrap();
    bind(&host, &mut host.kernel(), &everything()).unwrap();
    let other = BindOptions {
        driver: Some("mlx5_vfio_pci".to_owned()),
        ..BindOptions::default()
    };
    bind(&host, &mut host.kernel(), &other).unwrap();
    assert_eq!(host.driver_of(DEVICES[0]).as_deref(), Some("mlx5_vfio_pci"));
    let restored = restore(&host, &mut host.kernel()).unwrap();
    assert_eq!(restored.len(), 3);
    assert_eq!(state(&host), before);
    assert!(restore(&host, &mut host.kernel()).unwrap().is_empty());
}

#[test]
fn a_device_given_back_by_hand_is_recorded_anew() {
    let host = host();
    bind(&host, &mut host.kernel(), &BindOptions::default()).unwrap();
    let mut kernel = host.kernel();
    let device = host.root.device(at(DEVICES[0]));
    let drivers = host.path("sys/bus/pci/drivers");
    host.driver("pci-stub");
    for (attribute, value) in [
        (device.join("driver_override"), "pci-stub"),
        (drivers.join("vfio-pci/unbind"), DEVICES[0]),
        (drivers.join("pci-stub/bind"), DEVICES[0]),
    ] {
        kernel.write(&attribute, value).unwrap();
    }
    bind(&host, &mut host.kernel(), &BindOptions::default()).unwrap();
    restore(&host, &mut host.kernel()).unwrap();
    assert_eq!(host.driver_of(DEVICES[0]).as_deref(), Some("pci-stub"));
}

#[test]
fn another_device_at_the_address_is_left_alone() {
    let host = host();
    bind(&host, &mut host.kernel(), &everything()).unwrap();
    let device = host.root.device(at(DEVICES[2]));
    std::fs::write(device.join("device"), "0xbeef\n").unwrap();
    let restored = restore(&host, &mut host.kernel()).unwrap();
    assert_eq!(restored[2].outcome, Outcome::Another);
    assert_eq!(host.driver_of(DEVICES[2]).as_deref(), Some("vfio-pci"));
    let rules = host.path("etc/udev/rules.d");
    assert_eq!(std::fs::read_dir(rules).unwrap().count(), 0);
}

#[test]
fn after_a_reboot_what_a_rule_has_bound_is_left_to_the_host() {
    let host = host();
    bind(&host, &mut host.kernel(), &everything()).unwrap();
    let rules = host
        .traces()
        .into_iter()
        .filter(|(name, _)| name.starts_with("etc/"));
    let rules: Vec<_> = rules.collect();
    assert_eq!(rules.len(), 3);

    // The host boots: drivers have what they match, and the rules come to each device by itself.
    let host = self::host();
    for (name, text) in &rules {
        host.file(name, text);
    }
    let options = BindOptions {
        driver: Some("vfio-pci".to_owned()),
        from_rule: true,
        ..BindOptions::default()
    };
    for address in DEVICES {
        let bind = |session: &mut Session<'_>| busway_host::bind(session, &[at(address)], &options);
        with(&host.root, &mut host.kernel(), bind).unwrap();
        assert_eq!(host.driver_of(address).as_deref(), Some("vfio-pci"));
    }
    let restored = restore(&host, &mut host.kernel()).unwrap();
    let drivers: Vec<_> = DEVICES
        .iter()
        .map(|address| host.driver_of(address))
        .collect();
    let drivers: Vec<_> = drivers.iter().map(Option::as_deref).collect();
    assert_eq!(drivers, [Some("e1000e"), Some("igb"), Some("nvme")]);
    assert!(
        restored.iter().all(|device| device.persisted),
        "{restored:?}"
    );
    assert!(host.traces().is_empty(), "{:?}", host.traces());
}

#[test]
fn what_udev_could_not_bind_at_boot_is_bound_when_it_is_done_and_one_failure_keeps_no_other() {
    let before = host();
    bind(&before, &mut before.kernel(), &everything()).unwrap();
    let rules: Vec<_> = before
        .traces()
        .into_iter()
        .filter(|(name, _)| name.starts_with("etc/"))
        .collect();
    // The host boots: the first has another kind of device now, and nobody obeyed the rules of the others.
    let host = self::host();
    for (name, text) in &rules {
        host.file(name, text);
    }
    host.file("etc/udev/rules.d/60-busway-0000:77:00.0.rules", &rules[2].1);
    host.file(
        "etc/udev/rules.d/60-busway-0000:78:00.0.rules",
        "ACTION==\"add\"\n",
    );
    let device = host.root.device(at(DEVICES[0]));
    std::fs::write(device.join("device"), "0xbeef\n").unwrap();
    let mut kernel = host.kernel();
    kernel.fails = Box::new(|_, request| {
        (request == format!("drivers/vfio-pci/bind {}", DEVICES[1])).then_some(libc::EIO)
    });
    let error = with(&host.root, &mut kernel, busway_host::bind_persisted).unwrap_err();
    let said = error.to_string();
    assert!(
        said.contains(DEVICES[1]) && said.contains("0000:78:00.0.rules"),
        "{said}"
    );
    assert_eq!(error.failures.len(), 2);
    let [
        AtBoot::Another(another),
        AtBoot::Bound(bound),
        AtBoot::Absent(absent),
    ] = &error.done[..]
    else {
        panic!("{:?}", error.done);
    };
    assert_eq!(
        (*another, bound.address, *absent),
        (at(DEVICES[0]), at(DEVICES[2]), at("0000:77:00.0"))
    );
    let drivers = DEVICES.map(|address| host.driver_of(address));
    let drivers = drivers.each_ref().map(Option::as_deref);
    assert_eq!(drivers, [Some("e1000e"), Some("igb"), Some("vfio-pci")]);
    // Nothing is recorded, as after a rule, and the next time does the rest.
    std::fs::remove_file(host.path("etc/udev/rules.d/60-busway-0000:78:00.0.rules")).unwrap();
    let done = with(&host.root, &mut host.kernel(), busway_host::bind_persisted).unwrap();
    assert_eq!(done.len(), 4);
    assert_eq!(host.driver_of(DEVICES[1]).as_deref(), Some("vfio-pci"));
    assert!(
        !host
            .traces()
            .keys()
            .any(|name| name.ends_with("devices.json"))
    );
}

#[test]
fn nodes_go_to_the_user_and_back() {
    let host = host();
    // VFIO has it already, by no doing of Busway's.
    let mut kernel = host.kernel();
    bind(&host, &mut kernel, &BindOptions::default()).unwrap();
    std::fs::remove_file(host.path("run/busway/devices.json")).unwrap();
    let before = host.state();
    let user = BindOptions {
        user: Some(4711),
        ..BindOptions::default()
    };
    bind(&host, &mut kernel, &user).unwrap();
    let owners = |host: &FakeHost| -> Vec<_> {
        let traces = host.traces().into_iter();
        traces
            .filter(|(name, _)| name.ends_with(".owner"))
            .map(|(_, owner)| owner)
            .collect()
    };
    assert_eq!(owners(&host), ["4711"; 5]);
    restore(&host, &mut kernel).unwrap();
    assert_eq!(owners(&host), ["0"; 5]);
    assert_eq!(host.state(), before);
}

#[test]
fn a_drive_that_udev_looks_at_is_bound_once_it_has() {
    let host = host();
    host.disk(DEVICES[2], "nvme/nvme0/nvme0n1", 259, &[]);
    host.process(77, "(udev-worker)", "dev/nvme0n1");
    let mut kernel = host.kernel();
    let refused = bind(&host, &mut kernel, &BindOptions::default()).unwrap_err();
    assert!(refused.to_string().contains("udev-worker"), "{refused}");
    // A rule of udev's own would wait for itself.
    let rule = BindOptions {
        from_rule: true,
        ..BindOptions::default()
    };
    kernel.udev = Some(77);
    let refused = bind(&host, &mut kernel, &rule).unwrap_err();
    assert!(refused.to_string().contains("udev-worker"), "{refused}");
    bind(&host, &mut kernel, &BindOptions::default()).unwrap();
    assert_eq!(host.driver_of(DEVICES[2]).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_variant_made_for_the_device_is_taken_unless_another_is_asked_for() {
    let host = host();
    host.file("proc/sys/kernel/osrelease", "6.12.9\n");
    host.file(
        "lib/modules/6.12.9/modules.alias",
        "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n\
         alias vfio_pci:v0000144Dd0000A808* nvme_vfio_pci\n",
    );
    host.file("sys/module/nvme_vfio_pci/drivers/pci:nvme-vfio-pci", "");
    bind(&host, &mut host.kernel(), &BindOptions::default()).unwrap();
    let drivers = DEVICES.map(|address| host.driver_of(address).unwrap());
    assert_eq!(drivers, ["vfio-pci", "vfio-pci", "nvme-vfio-pci"]);
    let asked = BindOptions {
        driver: Some("vfio_pci".to_owned()),
        ..BindOptions::default()
    };
    bind(&host, &mut host.kernel(), &asked).unwrap();
    assert_eq!(host.driver_of(DEVICES[2]).as_deref(), Some("vfio-pci"));
}

#[test]
fn two_at_once_do_not_interfere() {
    let host = host();
    let before = state(&host);
    let groups = [vec![at(DEVICES[0]), at(DEVICES[1])], vec![at(DEVICES[2])]];
    std::thread::scope(|scope| {
        for addresses in &groups {
            let host = &host;
            scope.spawn(move || {
                let mut kernel = host.kernel();
                let options = BindOptions::default();
                let bind =
                    |session: &mut Session<'_>| busway_host::bind(session, addresses, &options);
                with(&host.root, &mut kernel, bind).unwrap();
            });
        }
    });
    for address in DEVICES {
        assert_eq!(host.driver_of(address).as_deref(), Some("vfio-pci"));
    }
    assert_eq!(restore(&host, &mut host.kernel()).unwrap().len(), 3);
    assert_eq!(state(&host), before);
}

#[test]
fn each_reason_is_overruled_by_its_own_switch_and_by_no_other() {
    type Case = (Permit, fn(&FakeHost));
    let cases: [Case; 9] = [
        (Permit::Mounted, |host| {
            host.mount("259:0", "/data", "/dev/nvme0n1")
        }),
        (Permit::System, |host| {
            host.mount("259:0", "/usr", "/dev/nvme0n1")
        }),
        (Permit::Swap, |host| {
            host.append("proc/swaps", "/dev/nvme0n1 partition 8 0 -2")
        }),
        (Permit::Holders, |host| {
            host.mapped(0, "vg-data", "LVM-1", &["nvme0n1"])
        }),
        (Permit::Route, |host| host.default_route("eth0")),
        (Permit::VirtualFunctions, |host| {
            host.file("sys/bus/pci/devices/0000:01:00.0/sriov_totalvfs", "7\n");
            host.link(
                "sys/bus/pci/devices/0000:01:00.0/virtfn0",
                "sys/bus/pci/devices/0000:00:02.0",
            );
        }),
        (Permit::Display, |host| {
            host.file("sys/bus/pci/devices/0000:01:00.0/boot_vga", "1\n");
        }),
        (Permit::Programs, |host| {
            let within = Path::new("sound/card0/pcmC0D0p");
            let device = Path::new("sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0");
            host.class(&device.join(within), within, "snd/pcmC0D0p");
            host.process(77, "pipewire", "dev/snd/pcmC0D0p");
        }),
        (Permit::Group, |_| ()),
    ];
    for (own, prepare) in cases {
        let mut host = FakeHost::new();
        let function = |address| Spec {
            address,
            behind: "pci0000:00/0000:00:01.0",
            // A display's, where it is one.
            class: if own == Permit::Display {
                0x030000
            } else {
                0x010802
            },
            driver: Some("nvme"),
            ..Spec::default()
        };
        host.device(&Spec::default());
        if own == Permit::Group {
            host.device(&function("0000:01:00.1"));
        }
        host.device(&Spec {
            group: Some(if own == Permit::Group { 2 } else { 12 }),
            ..function("0000:01:00.0")
        });
        host.disk("0000:01:00.0", "nvme/nvme0/nvme0n1", 259, &[]);
        host.interface(Some("0000:01:00.0"), "eth0", &[]);
        prepare(&host);
        let addresses = [at("0000:01:00.0")];
        let bind = |permits: Permits| {
            let options = BindOptions {
                permits,
                ..BindOptions::default()
            };
            let bind = |session: &mut Session<'_>| busway_host::bind(session, &addresses, &options);
            with(&host.root, &mut host.kernel(), bind).map(drop)
        };
        let others = Permit::ALL
            .into_iter()
            .filter(|permit| *permit != own)
            .collect();
        let refused = bind(others).unwrap_err();
        assert!(matches!(refused, BindError::Refused(_)), "{own}: {refused}");
        assert!(
            refused.to_string().contains(own.switch()),
            "{own}: {refused}"
        );
        bind(Permits::from([own])).unwrap();
    }
}
