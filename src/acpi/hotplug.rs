//! The DSDT's part that tells of devices which come to bus 0 of a segment and leave it: slots with `_EJ0`, and a generic
//! event device whose event looks which of them it is about. §5.6.9, §6.3.
//!
//! The registers are [`devices::pci_hotplug`](crate::devices::pci_hotplug)'s. Root ports have no object here:
//! their slots are the guest's native driver's, by what `_OSC` grants.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name, Notify,
    OpRegion, OpRegionSpace, Or, Path, ResourceTemplate, Return, Scope, ShiftLeft, Store, ZERO,
};

use super::aml::Bytes;
use super::{Root, in_system_bus, path};
use crate::arch::{gsi, layout};
use crate::devices::pci_hotplug::{ADDED, EJECT, EJECT_REQUEST, OUTCOME, PRESENT, SIZE, WANTED};

/// The notification that a device may have come. §5.6.6, table 5.173.
const DEVICE_CHECK: u8 = 1;
/// `_STA`: present, enabled, shown and working. §6.3.7.
const STATUS_THERE: u8 = 0xf;

/// The registers by their names in the table, at their offsets.
const REGISTERS: [([u8; 4], u64); 5] = [
    (*b"ADDS", ADDED),
    (*b"WANT", WANTED),
    (*b"EJCT", EJECT),
    (*b"PRES", PRESENT),
    (*b"OUTC", OUTCOME),
];
/// Bytes of one.
const REGISTER_SIZE: u64 = 4;
/// They lie one after another.
const _: () = assert!(SIZE == REGISTER_SIZE * REGISTERS.len() as u64);

/// Appends what the slots need that the roots have a bit for; nothing where there is none.
pub(super) fn append(roots: &[Root], aml: &mut Vec<u8>) {
    let changing: Vec<_> = roots.iter().filter(|root| root.slots != 0).collect();
    for root in &changing {
        let slots = (0..32_u8).filter(|slot| root.slots >> slot & 1 != 0);
        let segment = root.segment;
        let slots: Vec<_> = slots.map(|slot| SlotObject { segment, slot }).collect();
        registers(segment, aml);
        let look = Look {
            segment,
            slots: &slots,
        };
        let mut children: Vec<&dyn Aml> = slots.iter().map(|slot| slot as &dyn Aml).collect();
        children.push(&look);
        let scope = path(&format!("\\_SB_.{}", root.name()));
        Scope::new(scope, children).to_aml_bytes(aml);
    }
    if !changing.is_empty() {
        event_device(&changing, aml);
    }
}

/// The container of a segment's registers.
fn container(segment: u16) -> String {
    match segment {
        0 => "PHPC".to_owned(),
        segment => format!("PH{segment:02X}"),
    }
}

/// A register, from anywhere in the namespace.
fn register(segment: u16, offset: u64) -> Path {
    let name = REGISTERS.iter().find(|(_, at)| *at == offset);
    let name = name.map_or("", |(name, _)| {
        std::str::from_utf8(name).unwrap_or_default()
    });
    path(&format!("\\_SB_.{}.{name}", container(segment)))
}

/// The registers, in a container that nobody else gives their address away.
fn registers(segment: u16, aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0A06"));
    let unique = match segment {
        0 => "busway PCI hot-plug".to_owned(),
        segment => format!("busway PCI hot-plug {segment}"),
    };
    let uid = Name::new(path("_UID"), &unique);
    let (start, size) = (layout::pci_hotplug(segment) as u32, SIZE as u32);
    let memory = Memory32Fixed::new(true, start, size);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&memory]));
    let region = OpRegion::new(path("HPRG"), OpRegionSpace::SystemMemory, &start, &size);
    let fields = REGISTERS
        .iter()
        .map(|(name, _)| FieldEntry::Named(*name, 8 * REGISTER_SIZE as usize));
    let fields = Field::new(
        path("HPRG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.collect(),
    );
    let children: Vec<&dyn Aml> = vec![&hid, &uid, &crs, &region, &fields];
    in_system_bus(&Device::new(path(&container(segment)), children), aml);
}

/// A slot of bus 0 of a segment.
struct SlotObject {
    segment: u16,
    slot: u8,
}

impl SlotObject {
    fn name(&self) -> String {
        format!("S{:03X}", self.slot)
    }

    fn bit(&self) -> u32 {
        1 << self.slot
    }
}

impl Aml for SlotObject {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (bit, address) = (self.bit(), u32::from(self.slot) << 16);
        let register = |offset| register(self.segment, offset);
        let (present, eject, outcome) = (register(PRESENT), register(EJECT), register(OUTCOME));
        let adr = Name::new(path("_ADR"), &address);
        // Unique in the machine, as the numbers of slots behind ports are: `RootSlot::physical_slot`.
        let number = self.segment << 5 | u16::from(self.slot);
        let sun = Name::new(path("_SUN"), &number);
        let sta = Bytes::of(&Method::new(
            path("_STA"),
            0,
            false,
            vec![
                &If::new(
                    &And::new(&ZERO, &present, &bit),
                    vec![&Return::new(&STATUS_THERE)],
                ),
                &Return::new(&0_u8),
            ],
        ));
        let ej0 = Bytes::of(&Method::new(
            path("_EJ0"),
            1,
            false,
            vec![&Store::new(&eject, &bit)],
        ));
        // Slot, status and notification in one write.
        let (notification, status) = (Local(0), Local(1));
        let ost = Bytes::of(&Method::new(
            path("_OST"),
            3,
            false,
            vec![
                &ShiftLeft::new(&notification, &Arg(0), &16_u8),
                &And::new(&status, &Arg(1), &0xff_u8),
                &ShiftLeft::new(&status, &status, &8_u8),
                &Or::new(&status, &status, &notification),
                &Or::new(&outcome, &status, &self.slot),
            ],
        ));
        Device::new(path(&self.name()), vec![&adr, &sun, &sta, &ej0, &ost]).to_aml_bytes(sink);
    }
}

/// The method that notifies each slot about which something is unseen, and says that it is seen.
struct Look<'a> {
    segment: u16,
    slots: &'a [SlotObject],
}

impl Aml for Look<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let register = |offset| register(self.segment, offset);
        let (added, wanted) = (register(ADDED), register(WANTED));
        let (come, leaves) = (Local(0), Local(1));
        let mut steps = Vec::new();
        for (local, register) in [(&come, &added), (&leaves, &wanted)] {
            Store::new(local, register).to_aml_bytes(&mut steps);
            Store::new(register, local).to_aml_bytes(&mut steps);
        }
        for slot in self.slots {
            for (slots, notification) in [(&come, DEVICE_CHECK), (&leaves, EJECT_REQUEST)] {
                If::new(
                    &And::new(&ZERO, slots, &slot.bit()),
                    vec![&Notify::new(&path(&slot.name()), &notification)],
                )
                .to_aml_bytes(&mut steps);
            }
        }
        Method::new(path("PCNT"), 0, true, vec![&Bytes(steps)]).to_aml_bytes(sink);
    }
}

/// The generic event device. §5.6.9.
fn event_device(roots: &[&Root], aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &"ACPI0013");
    let uid = Name::new(path("_UID"), &0_u8);
    // Level-triggered, active high: for as long as something is unseen.
    let interrupt = Interrupt::new(true, false, false, false, gsi::PCI_HOTPLUG);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt]));
    let mut looks = Vec::new();
    for root in roots {
        let look = path(&format!("\\_SB_.{}.PCNT", root.name()));
        MethodCall::new(look, vec![]).to_aml_bytes(&mut looks);
    }
    let looks = Bytes(looks);
    let event = Bytes::of(&Method::new(
        path("_EVT"),
        1,
        true,
        vec![&If::new(
            &Equal::new(&Arg(0), &gsi::PCI_HOTPLUG),
            vec![&looks],
        )],
    ));
    in_system_bus(
        &Device::new(path("GED0"), vec![&hid, &uid, &crs, &event]),
        aml,
    );
}
