//! A VM with 64 KiB of RAM and a real-mode guest whose instructions a test spells out.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use busway::arch::{CpuFeatures, CpuModel};
use busway::config::{CoreScheduling, MemoryConfig, Topology};
use busway::kvm::{BusDevice, Buses, Cores, EventSink, IrqRouter, KvmError, VcpuEvent, Vcpus, Vm};
use busway::memory::{Ram, Regions};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

/// Where the guest's code is and the boot processor begins.
pub(crate) const CODE: u16 = 0x1000;
/// Where a processor started by a SIPI with vector 2 begins.
pub(crate) const AP_CODE: u16 = 0x2000;
/// A byte written to this port comes back from [`Guest::next`].
pub(crate) const TELL: u8 = 0xf4;
/// Bytes of RAM.
const RAM: u64 = 0x1_0000;

/// How long something may take that happens.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long to wait for what must not happen.
const MOMENT: Duration = Duration::from_millis(100);

pub(crate) struct Guest {
    pub(crate) vcpus: Vcpus,
    pub(crate) buses: Buses,
    pub(crate) router: IrqRouter,
    pub(crate) regions: Arc<Regions>,
    pub(crate) ram: Ram,
    pub(crate) vm: Vm,
    told: Receiver<u8>,
    pub(crate) events: Receiver<VcpuEvent>,
}

struct Tell(Mutex<Sender<u8>>);

impl BusDevice for Tell {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let sender = self.0.lock().unwrap();
        for byte in data {
            sender.send(*byte).unwrap();
        }
    }
}

/// A VM as [`Guest::new`] makes it, or `None`, said on standard error, where there is no KVM.
pub(crate) fn guest(cpus: u8, code: &[&[u8]]) -> Option<Guest> {
    guest_with(CpuFeatures::default(), cpus, code)
}

/// As [`guest`], with these features of its processors.
pub(crate) fn guest_with(features: CpuFeatures, cpus: u8, code: &[&[u8]]) -> Option<Guest> {
    match Guest::new(features, cpus, code) {
        Ok(guest) => Some(guest),
        Err(error @ KvmError::Unavailable { .. }) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

impl Guest {
    fn new(features: CpuFeatures, cpus: u8, code: &[&[u8]]) -> Result<Self, KvmError> {
        let vm = Vm::new()?;
        let model = CpuModel::new(&vm, features)?;
        let config = MemoryConfig {
            size: RAM,
            ..Default::default()
        };
        let ram = Ram::new(&config, false).unwrap();
        let regions = Arc::new(Regions::default());
        regions.listen(Arc::new(vm.memslots())).unwrap();
        for region in ram.regions() {
            regions.add(region).unwrap();
        }
        let buses = Buses::default();
        let (sender, told) = mpsc::channel();
        buses
            .ports
            .insert("tell", TELL.into(), 1, Arc::new(Tell(Mutex::new(sender))))
            .unwrap();
        let (sender, events) = mpsc::channel();
        let sink: EventSink = Arc::new(move |event| sender.send(event).unwrap());
        let vcpus = Vcpus::new(
            &vm,
            &model,
            Topology::cores(cpus),
            cpus,
            &buses,
            &sink,
            Cores::keep_apart(CoreScheduling::Off).unwrap(),
        )?;
        let guest = Self {
            vcpus,
            buses,
            router: vm.irq_router()?,
            regions,
            ram,
            vm,
            told,
            events,
        };
        guest.write(CODE.into(), &code.concat());
        guest.enter()?;
        Ok(guest)
    }

    /// Puts the boot processor at the guest's first instruction, all segments at 0.
    pub(crate) fn enter(&self) -> Result<(), KvmError> {
        self.vcpus.enter(|sregs| {
            (sregs.cs.base, sregs.cs.selector) = (0, 0);
            kvm_bindings::kvm_regs {
                rip: CODE.into(),
                rsp: 0x8000,
                rflags: 2,
                ..Default::default()
            }
        })
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let memory = self.ram.guest().memory();
        memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// The next byte that the guest tells.
    pub(crate) fn next(&self) -> u8 {
        match self.told.recv_timeout(PATIENCE) {
            Ok(byte) => byte,
            Err(error) => panic!(
                "the guest says nothing: {error} {:?}",
                self.events.try_recv()
            ),
        }
    }

    /// The guest tells nothing for a moment.
    pub(crate) fn is_silent(&self) -> bool {
        self.told.recv_timeout(MOMENT) == Err(RecvTimeoutError::Timeout)
    }

    /// The next thing that a vCPU cannot deal with.
    pub(crate) fn event(&self) -> VcpuEvent {
        self.events.recv_timeout(PATIENCE).unwrap()
    }
}

/// `out TELL, al`
pub(crate) const TELL_AL: &[u8] = &[0xe6, TELL];
/// `jmp $`, without a `hlt`, so that only a kick gets the thread out.
pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
/// `cli; hlt; jmp` back to the `hlt`
pub(crate) const STOP: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];

/// `mov al, value`
pub(crate) fn al(value: u8) -> [u8; 2] {
    [0xb0, value]
}

/// `mov ax, segment; mov ds, ax`
pub(crate) fn ds(segment: u16) -> [u8; 5] {
    let [low, high] = segment.to_le_bytes();
    [0xb8, low, high, 0x8e, 0xd8]
}

/// `mov ecx, msr; mov eax, value; mov edx, high; wrmsr`
pub(crate) fn wrmsr(msr: u32, high: u32, value: u32) -> Vec<u8> {
    let mut code = Vec::new();
    for (opcode, operand) in [(0xb9, msr), (0xb8, value), (0xba, high)] {
        code.extend([0x66, opcode]);
        code.extend(operand.to_le_bytes());
    }
    code.extend([0x0f, 0x30]);
    code
}

/// IA32_APIC_BASE with x2APIC on and the boot processor's mark, and IA32_X2APIC_SIVR with the APIC
/// on. Intel SDM vol. 3A §11.12.1.
pub(crate) fn x2apic() -> Vec<u8> {
    // From disabled or xAPIC there is one step to x2APIC: EN is set already.
    let mut code = wrmsr(0x1b, 0, 0xfee0_0d00);
    code.extend(wrmsr(0x80f, 0, 0x1ff));
    code
}
