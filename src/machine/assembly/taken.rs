//! What a machine takes from the host: memory, and devices with their DMA space.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::Steps;
use crate::arch::CpuModel;
use crate::config::{MemoryConfig, VmConfig};
use crate::kvm::Vm;
use crate::machine::RunError;
use crate::machine::address_plan::{AddressPlan, PlannedFunction, PluggedRoom};
use crate::machine::early::Early;
use crate::machine::passthrough::{Found, OpenDevices, Opened, Passthrough};
use crate::memory::{Ram, Regions};
use crate::report::{Report, Stage};
use crate::virtio::MemoryTable;

/// What has been taken. Who uses something goes before what is used.
#[derive(Debug)]
pub(super) struct Taken {
    /// The first devices, not yet functions of the guest's.
    pub(super) opened: Option<Opened>,
    /// Guest memory as virtio devices' back ends know it.
    pub(super) table: Arc<MemoryTable>,
    pub(super) ram: Ram,
    pub(super) passthrough: Passthrough,
    pub(super) memory: MemoryMap,
}

impl Taken {
    /// Takes memory and the devices that were found, which are kept among `devices` as soon as they are open, and maps
    /// memory for them.
    pub(super) fn take(
        steps: &Steps<'_>,
        found: Found,
        devices: &OpenDevices,
    ) -> Result<Self, RunError> {
        let Steps {
            config,
            vm,
            report,
            early,
            ..
        } = steps;
        let memory = MemoryMap(Arc::default());
        let passthrough =
            Passthrough::new(config, vm, &memory.0, &steps.router, &steps.events, devices)?;
        passthrough.keep_iommufd(&found)?;
        let open = || passthrough.open(found, report);
        let (ram, opened) = populate_and_open(config, &steps.plan, open, report, early)?;
        let table = Arc::<MemoryTable>::default();
        memory.fill(&ram, vm, &table)?;
        report.set_guest_memory(ram.host_ranges());
        report.reached(Stage::Open);
        early.check()?;

        let opened = opened?;
        if let Some(opened) = &opened {
            passthrough.map(opened)?;
            passthrough.account(report);
        }
        report.reached(Stage::DmaMap);
        early.check()?;
        Ok(Self {
            opened,
            table,
            ram,
            passthrough,
            memory,
        })
    }
}

/// The list of regions, emptied when it is dropped, so that nothing is mapped for anybody then.
#[derive(Debug)]
pub(super) struct MemoryMap(pub(super) Arc<Regions>);

impl MemoryMap {
    /// Puts RAM into it, mapped into the VM and known to virtio devices' back ends.
    fn fill(&self, ram: &Ram, vm: &Vm, table: &Arc<MemoryTable>) -> Result<(), RunError> {
        self.0.listen(Arc::new(vm.memslots()))?;
        self.0.listen(table.clone())?;
        for region in ram.regions() {
            self.0.add(region)?;
        }
        Ok(())
    }
}

impl Drop for MemoryMap {
    fn drop(&mut self) {
        self.0.clear();
    }
}

/// Where RAM and windows lie, with room for what may be plugged in later.
pub(super) fn plan(
    config: &VmConfig,
    found: &Found,
    model: &CpuModel,
    room: PluggedRoom,
) -> Result<AddressPlan, RunError> {
    let platform = &config.platform;
    let mut planned = found.planned(platform.reserve());
    for segment in 0..platform.segments() {
        let slots = 0..platform.hotplug_slots(segment);
        planned.extend(slots.map(|_| PlannedFunction::empty_slot(platform.reserve(), segment)));
    }
    let bits = model.address_bits();
    Ok(AddressPlan::new(
        &config.memory_to_plan(),
        &planned,
        found.reserved(),
        bits,
        config.firmware.is_some(),
        room,
        platform.segments(),
    )?)
}

/// RAM, and the devices once they are open: the kernel resets each device that is opened, and memory is
/// populated meanwhile. What came of opening is told last, so that memory's error comes before it.
fn populate_and_open(
    config: &VmConfig,
    plan: &AddressPlan,
    open: impl FnOnce() -> Result<Option<Opened>, RunError> + Send,
    report: &Report,
    early: &Early,
) -> Result<(Ram, Result<Option<Opened>, RunError>), RunError> {
    let has_devices = !config.device.is_empty();
    let prefault = config.memory.prefault.unwrap_or(has_devices);
    let said = config
        .memory_zone
        .iter()
        .any(|zone| zone.prefault == Some(true));
    let memory = MemoryConfig {
        shared: config.shares_memory(),
        ..config.memory.clone()
    };
    let mut ram = Ram::around(
        &memory,
        &config.memory_zone,
        prefault || has_devices || said,
        plan.mmio32_start,
        &plan.reserved,
    )?;
    let balloon = config.balloon.as_ref();
    if let Some(block) = balloon.and_then(|balloon| balloon.block_size(config.memory.size)) {
        ram.split(block);
    }
    let failed = AtomicBool::new(false);
    let (populated, opened) = thread::scope(|scope| {
        let opening = scope.spawn(|| open().inspect_err(|_| failed.store(true, Ordering::Relaxed)));
        let populated = match ram.to_prefault(prefault) {
            0 => Ok(()),
            total => populate(&ram, prefault, total, report, early, &failed),
        };
        report.reached(Stage::Memory);
        let opened = opening.join().unwrap_or_else(|panic| resume_unwind(panic));
        (populated, opened)
    });
    populated?;
    Ok((ram, opened))
}

/// Touches all of RAM that is to be touched, which is `total` bytes, unless the machine is not wanted any more, or somebody else has failed and it is for nothing.
fn populate(
    ram: &Ram,
    unsaid: bool,
    total: u64,
    report: &Report,
    early: &Early,
    failed: &AtomicBool,
) -> Result<(), RunError> {
    let mut wanted = Ok(());
    report.pinning(0, total);
    ram.prefault(unsaid, |done| {
        report.pinning(done, total);
        wanted = early.check();
        if wanted.is_err() || failed.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    wanted
}
