//! What KVM is told of interrupts and doorbells.

use std::fmt;
use std::sync::Arc;

use kvm_bindings::KvmIrqRouting;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

type Done = Result<(), kvm_ioctls::Error>;

/// The VM that is told.
#[derive(Clone)]
pub(super) enum Wires {
    Vm(Arc<VmFd>),
    /// None: whatever is connected leads nowhere. A machine's devices can be used without KVM so.
    #[cfg(any(test, feature = "hostile"))]
    Loose,
}

impl fmt::Debug for Wires {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wires")
    }
}

impl From<Arc<VmFd>> for Wires {
    fn from(vm: Arc<VmFd>) -> Self {
        Self::Vm(vm)
    }
}

impl Wires {
    fn tell(&self, tell: impl FnOnce(&VmFd) -> Done) -> Done {
        match self {
            Self::Vm(vm) => tell(vm),
            #[cfg(any(test, feature = "hostile"))]
            Self::Loose => Ok(()),
        }
    }

    /// KVM API, KVM_SET_GSI_ROUTING
    pub(super) fn set_gsi_routing(&self, routing: &KvmIrqRouting) -> Done {
        self.tell(|vm| vm.set_gsi_routing(routing))
    }

    /// KVM API, KVM_IRQFD
    pub(super) fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Done {
        self.tell(|vm| vm.register_irqfd(event, gsi))
    }

    /// KVM API, KVM_IRQFD with KVM_IRQFD_FLAG_RESAMPLE
    pub(super) fn register_irqfd_with_resample(
        &self,
        event: &EventFd,
        resample: &EventFd,
        gsi: u32,
    ) -> Done {
        self.tell(|vm| vm.register_irqfd_with_resample(event, resample, gsi))
    }

    /// KVM API, KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN
    pub(super) fn unregister_irqfd(&self, event: &EventFd, gsi: u32) -> Done {
        self.tell(|vm| vm.unregister_irqfd(event, gsi))
    }

    /// KVM API, KVM_IRQ_LINE
    pub(super) fn set_irq_line(&self, gsi: u32, asserted: bool) -> Done {
        self.tell(|vm| vm.set_irq_line(gsi, asserted))
    }

    /// KVM API, KVM_IOEVENTFD
    pub(super) fn register_ioevent(&self, event: &EventFd, at: &IoEventAddress) -> Done {
        self.tell(|vm| vm.register_ioevent(event, at, NoDatamatch))
    }

    /// KVM API, KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN
    pub(super) fn unregister_ioevent(&self, event: &EventFd, at: &IoEventAddress) -> Done {
        self.tell(|vm| vm.unregister_ioevent(event, at, NoDatamatch))
    }
}
