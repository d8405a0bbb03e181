//! The VM: what is made of it before there is a vCPU, and what the host's KVM can do.

use std::sync::Arc;
use std::{fmt, fs, io};

use kvm_bindings::{
    KVM_CAP_PMU_CAPABILITY, KVM_PIT_SPEAKER_DUMMY, KVM_PMU_CAP_DISABLE, kvm_enable_cap,
    kvm_irqchip, kvm_msi, kvm_pit_config, kvm_pit_state2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use super::error::KvmError;
use super::{Doorbells, IrqRouter, KvmVfio, Memslots};
use crate::memory::layout;

/// The only API version there is. KVM API §4.1.
const API_VERSION: i32 = 12;

/// Where messages to local APICs go, each at its id times 4 KiB, and what makes one an NMI. Intel SDM vol. 3A §11.11
const MESSAGES: u32 = 0xfee0_0000;
const DELIVERY_NMI: u32 = 4 << 8;

/// What no VM can do without, and what a person should read where it is missing.
const REQUIRED: [(Cap, &str); 11] = [
    (
        Cap::Irqchip,
        "the in-kernel interrupt controllers (KVM_CAP_IRQCHIP)",
    ),
    (Cap::Irqfd, "irqfd (KVM_CAP_IRQFD)"),
    (
        Cap::IrqfdResample,
        "level-triggered irqfd (KVM_CAP_IRQFD_RESAMPLE)",
    ),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (Cap::Ioeventfd, "ioeventfd (KVM_CAP_IOEVENTFD)"),
    (
        Cap::IoeventfdNoLength,
        "ioeventfd of any length (KVM_CAP_IOEVENTFD_NO_LENGTH)",
    ),
    (Cap::Pit2, "the in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "KVM_SET_TSS_ADDR (KVM_CAP_SET_TSS_ADDR)"),
    (
        Cap::ImmediateExit,
        "immediate exit (KVM_CAP_IMMEDIATE_EXIT)",
    ),
    (Cap::MpState, "vCPU states (KVM_CAP_MP_STATE)"),
];

/// A VM with its interrupt controllers and timer, and no memory or vCPU yet.
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    power_on: Chips,
}

/// The in-kernel interrupt controllers and timer.
struct Chips {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("fd", &self.fd).finish()
    }
}

impl Vm {
    /// Opens KVM, checks that it can do what is needed, and makes an empty VM.
    ///
    /// # Errors
    /// [`KvmError`], with reason and remedy.
    pub fn new() -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(|error| {
            let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            KvmError::unavailable(&io::Error::from(error), &cpuinfo)
        })?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::ApiVersion(version));
        }
        for (capability, name) in REQUIRED {
            if !kvm.check_extension(capability) {
                return Err(KvmError::MissingCapability(name));
            }
        }

        let fd = create_vm(&kvm)?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::ioctl("KVM_SET_IDENTITY_MAP_ADDR", "the VM"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(KvmError::ioctl("KVM_SET_TSS_ADDR", "the VM"))?;
        fd.create_irq_chip()
            .map_err(KvmError::ioctl("KVM_CREATE_IRQCHIP", "the VM"))?;
        // The speaker port (0x61) shows the timer's channel 2, which Linux may calibrate with.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit)
            .map_err(KvmError::ioctl("KVM_CREATE_PIT2", "the VM"))?;
        let power_on = Chips::read(&fd)?;
        Ok(Self {
            kvm,
            fd: Arc::new(fd),
            power_on,
        })
    }

    /// Puts the interrupt controllers and the timer into their state at power-on.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn reset_chips(&self) -> Result<(), KvmError> {
        self.power_on.write(&self.fd)
    }

    /// Gives these vCPUs a non-maskable interrupt each, as a message to their APICs does whose delivery mode is NMI.
    /// Intel SDM vol. 3A §11.11. Their ids are the vCPUs' numbers. One that waits for its SIPI is not to be among them:
    /// KVM keeps the interrupt, and then leaves `KVM_RUN` again and again (linux/arch/x86/kvm/x86.c,
    /// `kvm_arch_vcpu_ioctl_run`).
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn interrupt(&self, vcpus: impl Iterator<Item = u8>) -> Result<(), KvmError> {
        for id in vcpus {
            let message = kvm_msi {
                address_lo: MESSAGES | u32::from(id) << 12,
                data: DELIVERY_NMI,
                ..Default::default()
            };
            self.fd
                .signal_msi(message)
                .map_err(KvmError::ioctl("KVM_SIGNAL_MSI", "the VM"))?;
        }
        Ok(())
    }

    /// The memory slots. To be called once: each call starts with all slots free.
    #[must_use]
    pub fn memslots(&self) -> Memslots {
        Memslots::new(self.fd.clone(), self.kvm.get_nr_memslots())
    }

    /// The GSI routing table, with the legacy pins routed. To be called once.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn irq_router(&self) -> Result<IrqRouter, KvmError> {
        // KVM_CAP_IRQ_ROUTING is the number of routes, 0 meaning none at all.
        let limit = self.kvm.check_extension_int(Cap::IrqRouting);
        IrqRouter::new(self.fd.clone(), u32::try_from(limit).unwrap_or(0))
    }

    /// The ioeventfds.
    #[must_use]
    pub fn doorbells(&self) -> Doorbells {
        Doorbells::new(self.fd.clone())
    }

    /// The KVM-VFIO device, which has to know each VFIO file (group or device) in use.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn vfio(&self) -> Result<KvmVfio, KvmError> {
        KvmVfio::new(&self.fd)
    }

    /// Has no vCPU have performance counters; `false` where this host's KVM cannot, which then goes by
    /// CPUID alone. To be called before the first vCPU is made. KVM API, KVM_CAP_PMU_CAPABILITY.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub(super) fn disable_pmu(&self) -> Result<bool, KvmError> {
        let can = self.kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        if u32::try_from(can).unwrap_or(0) & KVM_PMU_CAP_DISABLE == 0 {
            return Ok(false);
        }
        let disable = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            args: [KVM_PMU_CAP_DISABLE.into(), 0, 0, 0],
            ..Default::default()
        };
        self.fd
            .enable_cap(&disable)
            .map_err(KvmError::ioctl("KVM_ENABLE_CAP", "the VM"))?;
        Ok(true)
    }

    /// KVM itself, for what is asked of the host and not of the VM.
    pub(super) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's descriptor.
    pub(super) fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }
}

fn create_vm(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            // A signal while KVM registers its MMU notifier.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(KvmError::ioctl("KVM_CREATE_VM", "/dev/kvm")),
        }
    }
}

impl Chips {
    fn read(fd: &VmFd) -> Result<Self, KvmError> {
        let mut irqchips = [kvm_irqchip::default(); 3];
        // 0 and 1 are the two PICs, 2 is the IOAPIC: linux/kvm.h, KVM_IRQCHIP_*.
        for (id, chip) in (0..).zip(&mut irqchips) {
            chip.chip_id = id;
            fd.get_irqchip(chip)
                .map_err(KvmError::ioctl("KVM_GET_IRQCHIP", "the VM"))?;
        }
        let pit = fd
            .get_pit2()
            .map_err(KvmError::ioctl("KVM_GET_PIT2", "the VM"))?;
        Ok(Self { irqchips, pit })
    }

    fn write(&self, fd: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            fd.set_irqchip(chip)
                .map_err(KvmError::ioctl("KVM_SET_IRQCHIP", "the VM"))?;
        }
        fd.set_pit2(&self.pit)
            .map_err(KvmError::ioctl("KVM_SET_PIT2", "the VM"))
    }
}
