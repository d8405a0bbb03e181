//! Reading, binding and giving back devices on made-up hosts.

mod checks;
#[path = "../fake_host/mod.rs"]
mod fake_host;
mod networks;
mod programs;
mod storage;

use busway_host::{
    BindError, BindOptions, Bound, Host, Kernel, Permits, Refusal, Session, UnbindError, Unbound,
    Usage,
};
use busway_pci::Bdf;
use fake_host::library::HOSTS;
use fake_host::{FakeHost, Spec};
use proptest::prelude::*;

fn at(address: &str) -> Bdf {
    address.parse().unwrap()
}

fn bind(
    host: &FakeHost,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
) -> Result<Vec<Bound>, BindError> {
    let mut tell = |_: &_| ();
    let mut session = Session::new(&host.root, kernel, &mut tell);
    busway_host::bind(&mut session, addresses, &BindOptions::default())
}

fn unbind(
    host: &FakeHost,
    kernel: &mut dyn Kernel,
    addresses: &[Bdf],
) -> Result<Vec<Unbound>, UnbindError> {
    let mut tell = |_: &_| ();
    let mut session = Session::new(&host.root, kernel, &mut tell);
    busway_host::unbind(&mut session, addresses, &Permits::new())
}

fn uses(host: &FakeHost, address: &str) -> Vec<String> {
    let host = Host::read(&host.root).unwrap();
    host.usage(at(address))
        .iter()
        .map(Usage::to_string)
        .collect()
}

const NVME: Spec<'_> = Spec {
    address: "0000:01:00.0",
    behind: "pci0000:00/0000:00:01.0",
    vendor: 0x144d,
    device: 0xa808,
    class: 0x010802,
    group: Some(12),
    node: 0,
    driver: Some("nvme"),
    driver_override: None,
};

/// Two NICs in one group behind a port, and an NVMe drive that has no driver.
fn host_with_three() -> FakeHost {
    let mut host = FakeHost::new();
    host.device(&Spec {
        address: "0000:00:01.0",
        class: 0x060400,
        driver: Some("pcieport"),
        group: Some(2),
        ..Spec::default()
    });
    host.device(&Spec::default());
    host.device(&Spec {
        address: "0000:00:02.1",
        driver: Some("igb"),
        driver_override: Some("igb"),
        ..Spec::default()
    });
    host.device(&Spec {
        driver: None,
        ..NVME
    });
    host
}

const THREE: [&str; 3] = ["0000:00:02.0", "0000:00:02.1", "0000:01:00.0"];

#[test]
fn binding_and_giving_back_ends_where_it_began() {
    let mut host = host_with_three();
    host.native("0000:01:00.0", "nvme");
    let mut kernel = host.kernel();
    let addresses = THREE.map(at);
    let bound = bind(&host, &mut kernel, &addresses).unwrap();
    assert_eq!(bound.len(), 3);
    assert_eq!(kernel.log.first().unwrap(), "modprobe vfio-pci");
    for address in THREE {
        assert_eq!(host.driver_of(address).as_deref(), Some("vfio-pci"));
    }

    // A second time changes nothing.
    kernel.log.clear();
    let again = bind(&host, &mut kernel, &addresses).unwrap();
    assert!(again.iter().all(|device| device.already));
    assert!(kernel.log.is_empty());

    let back = unbind(&host, &mut kernel, &addresses).unwrap();
    let drivers: Vec<_> = back.iter().map(|device| device.driver.as_deref()).collect();
    assert_eq!(drivers, [Some("e1000e"), Some("igb"), Some("nvme")]);
    // What was reserved before is reserved again.
    let reserved = |address: &str| host.state()[address].1.clone();
    assert_eq!(THREE.map(reserved), ["(null)", "igb", "(null)"]);
}

#[test]
fn a_driver_that_was_never_loaded_is_loaded_when_its_device_comes_back() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("vfio-pci"),
        driver_override: Some("vfio-pci"),
        ..NVME
    });
    host.native(NVME.address, "nvme");
    std::fs::remove_dir(host.path("sys/bus/pci/drivers/nvme")).unwrap();
    host.file("modules/pci:v0000144Dd0000A808", "nvme");
    let back = unbind(&host, &mut host.kernel(), &[at(NVME.address)]).unwrap();
    assert_eq!(back[0].driver.as_deref(), Some("nvme"));
}

#[test]
fn a_device_that_the_host_has_no_driver_for_comes_back_without_one() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("vfio-pci"),
        driver_override: Some("vfio-pci"),
        ..NVME
    });
    let back = unbind(&host, &mut host.kernel(), &[at(NVME.address)]).unwrap();
    assert_eq!(back[0].former.as_deref(), Some("vfio-pci"));
    assert_eq!(back[0].driver, None);
}

#[test]
fn a_device_in_another_drivers_hands_is_not_touched_by_unbind() {
    let mut host = FakeHost::new();
    host.device(&Spec {
        driver: Some("pci-stub"),
        driver_override: Some("pci-stub"),
        ..NVME
    });
    let mut kernel = host.kernel();
    let back = unbind(&host, &mut kernel, &[at(NVME.address)]).unwrap();
    assert_eq!(
        (&back[0].former, back[0].driver.as_deref()),
        (&None, Some("pci-stub"))
    );
    assert!(kernel.log.is_empty());
}

#[test]
fn a_process_that_holds_another_member_of_the_group_keeps_both_from_coming_back() {
    let mut host = FakeHost::new();
    for address in ["0000:01:00.0", "0000:01:00.1"] {
        host.device(&Spec {
            address,
            driver: Some("vfio-pci"),
            ..NVME
        });
    }
    host.file(
        "sys/bus/pci/devices/0000:01:00.1/vfio-dev/vfio0/dev",
        "511:0\n",
    );
    host.process(4242, "busway", "dev/vfio/devices/vfio0");
    let mut kernel = host.kernel();
    let result = unbind(&host, &mut kernel, &[at("0000:01:00.0")]);
    let Err(UnbindError::Refused(refused)) = result else {
        panic!("{result:?}");
    };
    assert!(
        matches!(&refused.0[..], [Refusal::HeldOpen { .. }]),
        "{refused}"
    );
    assert!(kernel.log.is_empty());
}

/// Binds with one request failing. Returns whether that was reached.
fn bind_failing(host: &FakeHost, addresses: &[Bdf], number: usize) -> bool {
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.fails = Box::new(move |n, _| (n == number).then_some(libc::EINVAL));
    match bind(host, &mut kernel, addresses) {
        Ok(_) => false,
        Err(BindError::Undone { stranded, .. }) => {
            assert!(stranded.is_empty(), "{stranded:?}");
            assert_eq!(host.state(), before, "after {:#?}", kernel.log);
            true
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_failure_at_any_step_leaves_every_device_as_it_was() {
    let fails_at = |&number: &usize| bind_failing(&host_with_three(), &THREE.map(at), number);
    let reached = (0..).take_while(fails_at).count();
    // Module; journal; override, detach and attach of two; override and attach of the one without a
    // driver.
    assert_eq!(reached, 1 + 1 + 3 + 3 + 2);
}

#[test]
fn what_cannot_be_undone_is_named_and_the_rest_is_undone() {
    let host = host_with_three();
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.fails = Box::new(|_, request| {
        (request == "drivers/vfio-pci/bind 0000:01:00.0"
            || request == "drivers/igb/bind 0000:00:02.1")
            .then_some(libc::EIO)
    });
    let result = bind(&host, &mut kernel, &THREE.map(at));
    let Err(BindError::Undone { stranded, .. }) = result else {
        panic!("{result:?}");
    };
    assert_eq!(stranded.len(), 1);
    assert_eq!(stranded[0].address, at("0000:00:02.1"));
    let after = host.state();
    for address in ["0000:00:02.0", "0000:01:00.0"] {
        assert_eq!(after[address], before[address]);
    }
}

#[test]
fn a_device_that_vanishes_is_an_error_and_the_rest_is_undone() {
    for number in 0..10 {
        let host = host_with_three();
        let mut before = host.state();
        let mut kernel = host.kernel();
        kernel.unplug_at = Some((number, "0000:01:00.0".to_owned()));
        let result = bind(&host, &mut kernel, &THREE.map(at));
        assert!(
            matches!(result, Err(BindError::Undone { .. })),
            "{number}: {result:?}"
        );
        before.remove("0000:01:00.0");
        assert_eq!(host.state(), before, "{number}");
    }
}

#[test]
fn a_driver_that_turns_the_device_away_is_noticed_though_the_write_succeeded() {
    let host = host_with_three();
    let before = host.state();
    let mut kernel = host.kernel();
    kernel.deaf_to = Some("drivers/vfio-pci/bind");
    let result = bind(&host, &mut kernel, &THREE.map(at));
    assert!(
        result
            .unwrap_err()
            .to_string()
            .contains("the device is with no driver")
    );
    assert_eq!(host.state(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_devices_survive_any_failure(
        devices in prop::collection::vec((0..4usize, any::<bool>(), any::<bool>()), 1..6),
        number in 0..24usize,
    ) {
        let mut host = FakeHost::new();
        let mut asked = Vec::new();
        for (index, &(driver, reserved, chosen)) in devices.iter().enumerate() {
            let address = format!("0000:0{}:00.0", index + 1);
            let driver = [None, Some("nvme"), Some("pci-stub"), Some("vfio-pci")][driver];
            // A reserved device is with the driver that it is reserved for, or with none yet.
            let driver_override = driver.filter(|_| reserved);
            let group = Some(index as u32);
            host.device(&Spec { address: &address, driver, driver_override, group, ..NVME });
            if chosen {
                asked.push(at(&address));
            }
        }
        bind_failing(&host, &asked, number);
    }
}

#[test]
fn no_host_of_the_library_gets_a_control_character_past_the_model() {
    let reported = fake_host::library::REPORTED;
    for (name, _) in fake_host::library::HOSTS.into_iter().chain(reported) {
        let fake = FakeHost::named(name);
        let host = Host::read(&fake.root).unwrap();
        assert!(host.devices().count() > 0, "{name}");
        for device in host.devices() {
            let uses = host.usage(device.address).iter().map(Usage::to_string);
            let texts = uses.chain(device.driver.clone());
            let texts = texts.chain(device.reset_methods.clone());
            for text in texts.chain(device.modalias.clone()) {
                assert!(!text.chars().any(char::is_control), "{name}: {text:?}");
            }
        }
    }
}
