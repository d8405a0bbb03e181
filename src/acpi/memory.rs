//! The DSDT's memory devices, by which RAM comes while the guest runs: each with `_STA`, `_CRS`, `_OST` and, where there are
//! nodes, `_PXM`; and a generic event device whose event looks which of them it is about. §5.6.9, §6.2.2, §9.11.
//!
//! The registers are [`devices::memory_hotplug`](crate::devices::memory_hotplug)'s. There is no `_EJ0`, for RAM that has come
//! stays.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Add, AddressSpace, AddressSpaceCacheable, And, Arg, CreateQWordField, Device, EISAName, Equal,
    Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt, Local,
    Memory32Fixed, Method, MethodCall, Name, Notify, ONE, OpRegion, OpRegionSpace, Or, Path,
    ResourceTemplate, Return, Scope, ShiftLeft, Store, Subtract, ZERO,
};

use super::aml::Bytes;
use super::{Hardware, in_system_bus, path};
use crate::arch::{gsi, layout};
use crate::devices::cpu_hotplug::DEVICE_CHECK;
use crate::devices::memory_hotplug::{
    ADDED, DEVICES, LENGTH, OUTCOME, PRESENT, SELECT, SIZE, START,
};

/// `_STA`: present, enabled, shown and working. §6.3.7.
const STATUS_THERE: u8 = 0xf;

/// The registers by their names in the table, at their offsets.
const REGISTERS: [([u8; 4], u64); 8] = [
    (*b"ADDS", ADDED),
    (*b"PRES", PRESENT),
    (*b"SLCT", SELECT),
    (*b"STRL", START),
    (*b"STRH", START + REGISTER_SIZE),
    (*b"LENL", LENGTH),
    (*b"LENH", LENGTH + REGISTER_SIZE),
    (*b"OUTC", OUTCOME),
];
/// Bytes of one.
const REGISTER_SIZE: u64 = 4;
/// They lie one after another.
const _: () = assert!(SIZE == REGISTER_SIZE * REGISTERS.len() as u64);

/// Offsets in an address space descriptor of 64 bits: its lowest and highest address, and its length. §6.4.3.5.1.
const DESCRIPTOR_FIRST: u8 = 14;
const DESCRIPTOR_LAST: u8 = 22;
const DESCRIPTOR_LENGTH: u8 = 38;

/// Appends the memory devices, where RAM comes by them.
pub(super) fn append(hardware: &Hardware, aml: &mut Vec<u8>) {
    if !hardware.memory_devices {
        return;
    }
    controller(aml);
    // All of what comes by them is one piece.
    let pluggable = hardware.pluggable.as_ref();
    let piece = pluggable.and_then(|memory| memory.pieces.first());
    let node = piece.map(|(node, _)| *node);
    let node = node.filter(|_| hardware.numa.is_some());
    let mut devices = Vec::new();
    for number in 0..DEVICES {
        MemoryDevice { number, node }.to_aml_bytes(&mut devices);
    }
    look(&mut devices);
    Scope::new(path("\\_SB_"), vec![&Bytes(devices)]).to_aml_bytes(aml);
    event_device(aml);
}

/// A memory device's object.
struct MemoryDevice {
    number: u8,
    /// The node of RAM that comes, where there are nodes.
    node: Option<u32>,
}

fn name(number: u8) -> String {
    format!("M{number:03X}")
}

fn bit(number: u8) -> u32 {
    1 << number
}

impl Aml for MemoryDevice {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let number = &self.number;
        let hid = Name::new(path("_HID"), &EISAName::new("PNP0C80"));
        let uid = Name::new(path("_UID"), number);
        // §6.2.14.
        let proximity = self.node.map(|node| Name::new(path("_PXM"), &node));
        let present = register("PRES");
        let sta = Bytes::of(&Method::new(
            path("_STA"),
            0,
            false,
            vec![
                &If::new(
                    &And::new(&ZERO, &present, &bit(*number)),
                    vec![&Return::new(&STATUS_THERE)],
                ),
                &Return::new(&0_u8),
            ],
        ));
        let resources = MethodCall::new(path("\\_SB_.MEMC.MCRS"), vec![number]);
        let crs = Bytes::of(&Method::new(
            path("_CRS"),
            0,
            false,
            vec![&Return::new(&resources)],
        ));
        let outcome = MethodCall::new(path("\\_SB_.MEMC.MOST"), vec![number, &Arg(0), &Arg(1)]);
        let ost = Bytes::of(&Method::new(path("_OST"), 3, false, vec![&outcome]));
        let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &sta, &crs, &ost];
        children.extend(proximity.iter().map(|name| name as &dyn Aml));
        Device::new(path(&name(*number)), children).to_aml_bytes(sink);
    }
}

/// A register, from anywhere in the namespace.
fn register(name: &str) -> Path {
    path(&format!("\\_SB_.MEMC.{name}"))
}

/// The registers, in a container that nobody else gives their address away, with what the devices' methods share.
fn controller(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0A06"));
    let uid = Name::new(path("_UID"), &"busway memory hot-plug");
    let (start, size) = (layout::MEMORY_HOTPLUG_START as u32, SIZE as u32);
    let memory = Memory32Fixed::new(true, start, size);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&memory]));
    let region = OpRegion::new(path("MREG"), OpRegionSpace::SystemMemory, &start, &size);
    let fields = REGISTERS
        .iter()
        .map(|(name, _)| FieldEntry::Named(*name, 8 * REGISTER_SIZE as usize));
    let fields = Field::new(
        path("MREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.collect(),
    );
    let (resources, outcome) = (resources(), outcome());
    let children: Vec<&dyn Aml> = vec![&hid, &uid, &crs, &region, &fields, &resources, &outcome];
    in_system_bus(&Device::new(path("MEMC"), children), aml);
}

/// The method that makes a device's resources: a descriptor whose addresses are read from the registers. One call at a time:
/// a device is selected, and then asked about.
fn resources() -> Bytes {
    let cached = AddressSpaceCacheable::Cacheable;
    // Any range; its numbers are 64 bits wide.
    let any = AddressSpace::new_memory(cached, true, 0_u64, u64::MAX - 1, None);
    let template = Name::new(path("TMPL"), &ResourceTemplate::new(vec![&any]));
    let field = |name: &str| Name::new_field_name(name);
    let made = path("TMPL");
    let (first, last, length) = (path("FRST"), path("LAST"), path("SIZE"));
    let (start, size) = (Local(0), Local(1));
    let (low, high) = (register("STRL"), register("STRH"));
    let (size_low, size_high) = (register("LENL"), register("LENH"));
    Bytes::of(&Method::new(
        path("MCRS"),
        1,
        true,
        vec![
            &template,
            &CreateQWordField::new(&field("FRST"), &made, &DESCRIPTOR_FIRST),
            &CreateQWordField::new(&field("LAST"), &made, &DESCRIPTOR_LAST),
            &CreateQWordField::new(&field("SIZE"), &made, &DESCRIPTOR_LENGTH),
            &Store::new(&register("SLCT"), &Arg(0)),
            &ShiftLeft::new(&start, &high, &32_u8),
            &Or::new(&start, &start, &low),
            &ShiftLeft::new(&size, &size_high, &32_u8),
            &Or::new(&size, &size, &size_low),
            &Store::new(&first, &start),
            &Store::new(&length, &size),
            &Add::new(&last, &start, &size),
            &Subtract::new(&last, &last, &ONE),
            &Return::new(&made),
        ],
    ))
}

/// The method that says what became of a notification: device, notification and status in one write.
fn outcome() -> Bytes {
    let (notification, code) = (Local(0), Local(1));
    Bytes::of(&Method::new(
        path("MOST"),
        3,
        false,
        vec![
            &ShiftLeft::new(&notification, &Arg(1), &16_u8),
            &And::new(&code, &Arg(2), &0xff_u8),
            &ShiftLeft::new(&code, &code, &8_u8),
            &Or::new(&code, &code, &notification),
            &Or::new(&register("OUTC"), &code, &Arg(0)),
        ],
    ))
}

/// The method that notifies each device about which something is unseen, and says that it is seen.
fn look(sink: &mut Vec<u8>) {
    let (added, seen) = (register("ADDS"), Local(0));
    let mut steps = Vec::new();
    Store::new(&seen, &added).to_aml_bytes(&mut steps);
    Store::new(&added, &seen).to_aml_bytes(&mut steps);
    for number in 0..DEVICES {
        If::new(
            &And::new(&ZERO, &seen, &bit(number)),
            vec![&Notify::new(&path(&name(number)), &DEVICE_CHECK)],
        )
        .to_aml_bytes(&mut steps);
    }
    Method::new(path("MSCN"), 0, true, vec![&Bytes(steps)]).to_aml_bytes(sink);
}

/// The generic event device. §5.6.9.
fn event_device(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &"ACPI0013");
    let uid = Name::new(path("_UID"), &2_u8);
    // Level-triggered, active high: for as long as something is unseen.
    let interrupt = Interrupt::new(true, false, false, false, gsi::MEMORY_HOTPLUG);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt]));
    let look = MethodCall::new(path("\\_SB_.MSCN"), vec![]);
    let event = Bytes::of(&Method::new(
        path("_EVT"),
        1,
        true,
        vec![&If::new(
            &Equal::new(&Arg(0), &gsi::MEMORY_HOTPLUG),
            vec![&look],
        )],
    ));
    in_system_bus(
        &Device::new(path("GED2"), vec![&hid, &uid, &crs, &event]),
        aml,
    );
}
