use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::config::VcpuAffinity;

const DEVICE: &str = "0000:01:00.0";

/// A route that leads nowhere.
#[derive(Debug)]
struct Nowhere(busway_vfio::EventFd);

impl InterruptRoute for Nowhere {
    fn update(&self, _: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn set_masked(&self, _: bool) -> Result<(), RouteError> {
        Ok(())
    }

    fn pending(&self) -> bool {
        false
    }

    fn event(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }

    fn trigger(&self) {}
}

#[derive(Debug)]
struct NowhereRoutes;

impl InterruptRoutes for NowhereRoutes {
    fn connect(&self, _: u16, _: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        Ok(Arc::new(Nowhere(busway_vfio::EventFd::new().unwrap())))
    }
}

/// A message for the processor with this APIC id.
fn to(id: u64) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000 | id << 12,
        data: 0x41,
    }
}

/// The host has interrupt `irq` for `vector` of the device.
fn add(root: &Path, irq: u32, vector: u16) {
    let numbers = root.join(format!("sys/bus/pci/devices/{DEVICE}/msi_irqs"));
    fs::create_dir_all(&numbers).unwrap();
    let folder = root.join(format!("proc/irq/{irq}"));
    fs::create_dir_all(folder.join(format!("vfio-msix[{vector}]({DEVICE})"))).unwrap();
    fs::write(folder.join("smp_affinity_list"), "").unwrap();
    // Last, for it is by this that it is found.
    fs::write(numbers.join(irq.to_string()), "msix").unwrap();
}

fn taken_on(root: &Path, irq: u32, cpus: &str) {
    let path = root.join(format!("proc/irq/{irq}/smp_affinity_list"));
    let limit = Instant::now() + Duration::from_secs(10);
    // What was written before stays behind it, in a plain file.
    while !fs::read_to_string(&path).unwrap().starts_with(cpus) {
        assert!(Instant::now() < limit, "{:?}", fs::read_to_string(&path));
        thread::yield_now();
    }
}

fn cpus() -> CpusConfig {
    let place = |vcpu, host_cpus: &[usize]| VcpuAffinity {
        vcpu,
        host_cpus: host_cpus.to_vec(),
    };
    CpusConfig {
        boot: 2,
        dedicated: true,
        affinity: vec![place(0, &[4]), place(1, &[5, 6])],
        ..CpusConfig::default()
    }
}

fn steering(root: &TempDir) -> Steering {
    let host = HostInterrupts {
        root: root.path().to_owned(),
    };
    Steering::with(Places::of(&cpus()), host).unwrap()
}

#[test]
fn an_interrupt_is_taken_where_the_vcpu_runs_that_it_is_for_and_follows_it() {
    let root = TempDir::new().unwrap();
    add(root.path(), 30, 0);
    add(root.path(), 31, 1);
    let steering = steering(&root);
    let routes = steering.routes(DEVICE, Arc::new(NowhereRoutes));
    let first = routes.connect(0, to(0)).unwrap();
    let second = routes.connect(1, to(1)).unwrap();
    taken_on(root.path(), 30, "4");
    taken_on(root.path(), 31, "5,6");
    first.update(to(1)).unwrap();
    second.update(to(0)).unwrap();
    taken_on(root.path(), 30, "5,6");
    taken_on(root.path(), 31, "4");
}

#[test]
fn one_that_the_host_makes_later_is_found_and_of_one_that_goes_nothing_is_kept() {
    let root = TempDir::new().unwrap();
    let steering = steering(&root);
    let routes = steering.routes(DEVICE, Arc::new(NowhereRoutes));
    let route = routes.connect(7, to(1)).unwrap();
    // As VFIO makes it when the route is there.
    add(root.path(), 40, 7);
    taken_on(root.path(), 40, "5,6");
    let gone = routes.connect(8, to(1)).unwrap();
    drop((route, gone));
    // One that was being looked for is given up in time.
    let limit = Instant::now() + Duration::from_secs(10);
    while !steering.shared.wishes().by_vector.is_empty() {
        assert!(Instant::now() < limit, "a wish is kept");
        thread::yield_now();
    }
}

#[test]
fn what_is_for_nobody_in_particular_stays_where_it_is() {
    let places = Places::of(&cpus());
    assert_eq!(places.of_message(to(1)), [5, 6]);
    let flat = |bits: u64| MsiMessage {
        address: 0xfee0_0004 | bits << 12,
        data: 0,
    };
    assert_eq!(places.of_message(flat(0b11)), [4, 5, 6]);
    for nobody in [to(2), to(0xff), flat(0), flat(0b100), MsiMessage::default()] {
        assert_eq!(places.of_message(nobody), [0_usize; 0]);
    }
    assert!(Steering::begin(&CpusConfig::default()).is_none());
}

#[test]
fn a_host_that_refuses_is_told_of_by_its_file() {
    let root = TempDir::new().unwrap();
    add(root.path(), 30, 0);
    let host = HostInterrupts {
        root: root.path().to_owned(),
    };
    assert!(!host.steer(DEVICE, 1, &[4]).unwrap(), "no such vector");
    assert!(!host.steer("0000:02:00.0", 0, &[4]).unwrap(), "no messages");
    assert!(host.steer(DEVICE, 0, &[4]).unwrap());
    let file = root.path().join("proc/irq/30/smp_affinity_list");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let error = host.steer(DEVICE, 0, &[4]).unwrap_err();
    assert!(
        error.to_string().contains("irq/30/smp_affinity_list"),
        "{error}"
    );
}
