//! The VM: what is made of it before there is a vCPU, and what the host's KVM can do.

use std::sync::Arc;
use std::{fmt, fs, io};

use kvm_ioctls::{Cap, Kvm, VmFd};

use super::error::KvmError;
use super::{Doorbells, IrqRouter, KvmVfio, Memslots};
use crate::arch::chips::{self, Chips};

/// The only API version there is. KVM API §4.1.
const API_VERSION: i32 = 12;

/// What no VM of any architecture can do without, and what a person should read where it is missing.
const REQUIRED: [(Cap, &str); 9] = [
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
    (Cap::UserMemory, "user memory (KVM_CAP_USER_MEMORY)"),
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
        for (capability, name) in REQUIRED.into_iter().chain(chips::REQUIRED) {
            if !kvm.check_extension(capability) {
                return Err(KvmError::MissingCapability(name));
            }
        }

        let fd = create_vm(&kvm)?;
        let power_on = Chips::make(&fd)?;
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
            self.fd
                .signal_msi(chips::nmi(id))
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

    /// KVM itself, for what is asked of the host and not of the VM.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's descriptor.
    pub(crate) fn fd(&self) -> &Arc<VmFd> {
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
