//! The interrupt controllers and the timer of a PC, which KVM has in the kernel: two PICs, the IOAPIC with the local
//! APICs, and the PIT.

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_PIT_SPEAKER_DUMMY, kvm_irq_routing_entry, kvm_irqchip, kvm_msi, kvm_pit_config,
    kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};

use super::layout;
use crate::kvm::KvmError;

/// What of KVM the chips take, and what a person should read where it is missing.
pub(crate) const REQUIRED: [(Cap, &str); 2] = [
    (Cap::Pit2, "the in-kernel timer (KVM_CAP_PIT2)"),
    (Cap::SetTssAddr, "KVM_SET_TSS_ADDR (KVM_CAP_SET_TSS_ADDR)"),
];

/// Pins of the IOAPIC; GSIs from here on are free for messages.
pub(crate) const IOAPIC_PINS: u32 = 24;
/// Pins of one of the two PICs.
const PIC_PINS: u32 = 8;
/// The timer's GSI, and the IOAPIC pin that it is wired to on a PC (an interrupt source override
/// in the MADT says so): the pin with the number 2 is the cascade of the PICs, which has none.
const TIMER_GSI: u32 = 0;
const TIMER_PIN: u32 = 2;

/// Where messages to local APICs go, each at its id times 4 KiB, and what makes one an NMI. Intel SDM vol. 3A §11.11
const MESSAGES: u32 = 0xfee0_0000;
const DELIVERY_NMI: u32 = 4 << 8;

/// The message that is a non-maskable interrupt for the local APIC with this id.
pub(crate) fn nmi(id: u8) -> kvm_msi {
    kvm_msi {
        address_lo: MESSAGES | u32::from(id) << 12,
        data: DELIVERY_NMI,
        ..Default::default()
    }
}

/// The chips in their state at power-on.
pub(crate) struct Chips {
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
}

impl Chips {
    /// Has KVM make the chips of a VM that has no vCPU yet.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub(crate) fn make(fd: &VmFd) -> Result<Self, KvmError> {
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
        Self::read(fd)
    }

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

    /// Puts the chips back into that state.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub(crate) fn write(&self, fd: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            fd.set_irqchip(chip)
                .map_err(KvmError::ioctl("KVM_SET_IRQCHIP", "the VM"))?;
        }
        fd.set_pit2(&self.pit)
            .map_err(KvmError::ioctl("KVM_SET_PIT2", "the VM"))
    }
}

/// The pins of a PC: each goes to its PIC and to the IOAPIC.
pub(crate) fn legacy_routes() -> Vec<kvm_irq_routing_entry> {
    let pin_route = |gsi, irqchip, pin| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin;
        entry
    };
    let pic = (0..2 * PIC_PINS)
        .filter(|gsi| *gsi != TIMER_PIN)
        .map(|gsi| {
            if gsi < PIC_PINS {
                pin_route(gsi, KVM_IRQCHIP_PIC_MASTER, gsi)
            } else {
                pin_route(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - PIC_PINS)
            }
        });
    let ioapic = (0..IOAPIC_PINS).filter(|gsi| *gsi != TIMER_PIN).map(|gsi| {
        let pin = if gsi == TIMER_GSI { TIMER_PIN } else { gsi };
        pin_route(gsi, KVM_IRQCHIP_IOAPIC, pin)
    });
    pic.chain(ioapic).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_pins_are_those_of_a_pc() {
        let routes: Vec<_> = legacy_routes()
            .iter()
            // SAFETY: `type_` says which member is there.
            .map(|entry| (entry.gsi, unsafe { entry.u.irqchip }))
            .map(|(gsi, chip)| (gsi, chip.irqchip, chip.pin))
            .collect();
        assert!(routes.contains(&(0, KVM_IRQCHIP_IOAPIC, 2)));
        assert!(routes.contains(&(0, KVM_IRQCHIP_PIC_MASTER, 0)));
        assert!(routes.contains(&(9, KVM_IRQCHIP_PIC_SLAVE, 1)));
        assert!(routes.contains(&(23, KVM_IRQCHIP_IOAPIC, 23)));
        assert!(routes.iter().all(|(gsi, ..)| *gsi != 2));
    }
}
