//! What the tests of a function share.

mod bars;
mod config;
mod hostile;
mod interrupts;
mod pace;
mod reset;

use std::sync::Arc;

use super::AssignedFunction;
use crate::fake::{FakeDevice, FakeLines, FakeRoutes};
use crate::{AssignOptions, IrqInfo, Placement, SurveyError, Wiring};
use busway_pci::PciFunction;
use busway_pci::pace::StoppedClock;

/// QEMU's NVMe drive as VFIO shows it, with an SR-IOV capability first in its extended list.
pub(super) fn nvme() -> FakeDevice {
    let mut fake = FakeDevice::default();
    fake.set_bar(0, 0x4000);
    fake.intx.count = 1;
    fake.msix = IrqInfo {
        count: 65,
        resizable: true,
    };
    let put = |offset, value: u32| fake.set_config(offset, &value.to_le_bytes());
    put(0x00, 0x0010_1b36);
    put(0x04, 0x0010_0007);
    put(0x08, 0x0108_0202);
    put(0x0c, 0x8000_0000 | 0x0080_0000);
    put(0x10, 0x0000_0004);
    put(0x2c, 0x1100_1af4);
    put(0x34, 0x40);
    put(0x3c, 0x0000_010b);
    // MSI-X at 0x40, power management at 0x60, PCI Express at 0x80.
    put(0x40, 0x0040_6011);
    put(0x44, 0x0000_2000);
    put(0x48, 0x0000_3000);
    put(0x60, 0x0003_8001);
    put(0x80, 0x0002_0010);
    put(0x84, 0x1000_8000);
    put(0x88, 0x0000_2010);
    put(0x94, 0xffff_ffff);
    // SR-IOV at 0x100, AER at 0x140, ARI at 0x180, serial number at 0x190.
    put(0x100, 0x1401_0010);
    put(0x104, 0xdead_beef);
    put(0x140, 0x1802_0001);
    put(0x148, 0x0046_2030);
    put(0x180, 0x1901_000e);
    put(0x184, 0x0000_0100);
    put(0x190, 0x0001_0003);
    put(0x194, 0x1234_5678);
    fake
}

fn function(fake: FakeDevice) -> (Arc<FakeDevice>, Arc<FakeRoutes>, Arc<AssignedFunction>) {
    let fake = Arc::new(fake);
    let routes = Arc::new(FakeRoutes::default());
    let function = assign("0000:01:00.0", fake.clone(), routes.clone()).unwrap();
    (fake, routes, function)
}

fn assign(
    name: &str,
    fake: Arc<FakeDevice>,
    routes: Arc<FakeRoutes>,
) -> Result<Arc<AssignedFunction>, SurveyError> {
    assign_with(name, fake, routes, &AssignOptions::default())
}

pub(super) fn assign_with(
    name: &str,
    fake: Arc<FakeDevice>,
    routes: Arc<FakeRoutes>,
    options: &AssignOptions,
) -> Result<Arc<AssignedFunction>, SurveyError> {
    AssignedFunction::new(name, fake, wiring(routes, Placement::default()), options)
}

fn wiring(routes: Arc<FakeRoutes>, placement: Placement) -> Wiring {
    Wiring {
        routes,
        lines: Arc::new(FakeLines::default()),
        resets: Arc::default(),
        clock: Arc::new(StoppedClock::default()),
        placement,
    }
}

/// The function that a guest has on bus 0.
fn on_root_bus(fake: FakeDevice) -> (Arc<FakeDevice>, Arc<AssignedFunction>) {
    let fake = Arc::new(fake);
    let wiring = wiring(Arc::default(), Placement::RootBus);
    let options = AssignOptions::default();
    let function = AssignedFunction::new("0000:01:00.0", fake.clone(), wiring, &options).unwrap();
    (fake, function)
}

pub(super) fn read(function: &AssignedFunction, offset: u16) -> u32 {
    let mut data = [0; 4];
    function.config_read(offset, &mut data);
    u32::from_le_bytes(data)
}

pub(super) fn write(function: &AssignedFunction, offset: u16, value: u32) {
    function.config_write(offset, &value.to_le_bytes());
}
