//! The DSDT's processor devices. §8.4. Where processors can come and leave, each has `_STA`, `_MAT`, `_EJ0` and `_OST`,
//! and a generic event device's event looks which of them it is about. §5.6.9, §6.3.
//!
//! The registers are [`devices::cpu_hotplug`](crate::devices::cpu_hotplug)'s.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, BufferData, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, If, Interrupt, Local, Memory32Fixed, Method, MethodCall, Name,
    Notify, OpRegion, OpRegionSpace, Or, Path, ResourceTemplate, Return, Scope, ShiftLeft,
    ShiftRight, Store, While, ZERO,
};

use super::aml::Bytes;
use super::{Cpu, Hardware, in_system_bus, path};
use crate::arch::{acpi as arch, gsi, layout};
use crate::devices::cpu_hotplug::{EJECT, EVENT, OUTCOME, PRESENT, SELECT, SIZE};

/// `_STA`: present, enabled, shown and working. §6.3.7.
const STATUS_THERE: u8 = 0xf;

/// The registers by their names in the table, at their offsets.
const REGISTERS: [([u8; 4], u64); 5] = [
    (*b"EVNT", EVENT),
    (*b"EJCT", EJECT),
    (*b"SLCT", SELECT),
    (*b"PRES", PRESENT),
    (*b"OUTC", OUTCOME),
];
/// Bytes of one.
const REGISTER_SIZE: u64 = 4;
/// They lie one after another.
const _: () = assert!(SIZE == REGISTER_SIZE * REGISTERS.len() as u64);

/// Appends the processors, whose `_UID`s are the MADT's.
pub(super) fn append(hardware: &Hardware, aml: &mut Vec<u8>) {
    if hardware.cpu_hotplug {
        controller(aml);
    }
    let mut processors = Vec::new();
    for (uid, cpu) in (0_u32..).zip(&hardware.cpus) {
        let processor = Processor {
            uid,
            cpu: *cpu,
            node: node_of(hardware, uid),
            comes_and_goes: hardware.cpu_hotplug,
        };
        processor.to_aml_bytes(&mut processors);
    }
    if hardware.cpu_hotplug {
        look(hardware, &mut processors);
    }
    Scope::new(path("\\_SB_"), vec![&Bytes(processors)]).to_aml_bytes(aml);
    if hardware.cpu_hotplug {
        event_device(aml);
    }
}

/// A processor's object.
struct Processor {
    uid: u32,
    cpu: Cpu,
    /// The node that it is in, where there are some.
    node: Option<u32>,
    comes_and_goes: bool,
}

fn node_of(hardware: &Hardware, uid: u32) -> Option<u32> {
    let numa = hardware.numa.as_ref()?;
    numa.cpus.get(usize::try_from(uid).ok()?).copied()
}

fn name(uid: u32) -> String {
    format!("C{uid:03X}")
}

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let uid = &self.uid;
        let hid = Name::new(path("_HID"), &"ACPI0007");
        let id = Name::new(path("_UID"), uid);
        let proximity = self.node.map(|node| Name::new(path("_PXM"), &node));
        let mut children: Vec<&dyn Aml> = vec![&hid, &id];
        // §6.2.14.
        children.extend(proximity.iter().map(|name| name as &dyn Aml));
        let status = MethodCall::new(path("\\_SB_.CPUC.CSTA"), vec![uid]);
        let sta = Bytes::of(&Method::new(
            path("_STA"),
            0,
            false,
            vec![&Return::new(&status)],
        ));
        // As it is in the MADT once it is there.
        let there = arch::madt_processor(
            *uid,
            Cpu {
                enabled: true,
                ..self.cpu
            },
        );
        let mat = Bytes::of(&Name::new(path("_MAT"), &BufferData::new(there)));
        let ejected = register("EJCT");
        let eject = Store::new(&ejected, uid);
        let ej0 = Bytes::of(&Method::new(path("_EJ0"), 1, false, vec![&eject]));
        let outcome = MethodCall::new(path("\\_SB_.CPUC.COST"), vec![uid, &Arg(0), &Arg(1)]);
        let ost = Bytes::of(&Method::new(path("_OST"), 3, false, vec![&outcome]));
        if self.comes_and_goes {
            children.extend([&sta as &dyn Aml, &mat]);
            // The first starts the guest, and stays.
            if *uid != 0 {
                children.extend([&ej0 as &dyn Aml, &ost]);
            }
        }
        Device::new(path(&name(*uid)), children).to_aml_bytes(sink);
    }
}

/// A register, from anywhere in the namespace.
fn register(name: &str) -> Path {
    path(&format!("\\_SB_.CPUC.{name}"))
}

/// The registers, in a container that nobody else gives their address away, with what the processors' methods share.
fn controller(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0A06"));
    let uid = Name::new(path("_UID"), &"busway CPU hot-plug");
    let (start, size) = (layout::CPU_HOTPLUG_START as u32, SIZE as u32);
    let memory = Memory32Fixed::new(true, start, size);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&memory]));
    let region = OpRegion::new(path("CREG"), OpRegionSpace::SystemMemory, &start, &size);
    let fields = REGISTERS
        .iter()
        .map(|(name, _)| FieldEntry::Named(*name, 8 * REGISTER_SIZE as usize));
    let fields = Field::new(
        path("CREG"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        fields.collect(),
    );
    // One call at a time: a processor is selected, and then asked about.
    let selected = register("SLCT");
    let select = Store::new(&selected, &Arg(0));
    let present = register("PRES");
    let status = Bytes::of(&Method::new(
        path("CSTA"),
        1,
        true,
        vec![
            &select,
            &If::new(
                &And::new(&ZERO, &present, &1_u8),
                vec![&Return::new(&STATUS_THERE)],
            ),
            &Return::new(&0_u8),
        ],
    ));
    // Processor, notification and status in one write.
    let (notification, code) = (Local(0), Local(1));
    let outcome = Bytes::of(&Method::new(
        path("COST"),
        3,
        false,
        vec![
            &ShiftLeft::new(&notification, &Arg(1), &16_u8),
            &And::new(&code, &Arg(2), &0xff_u8),
            &ShiftLeft::new(&code, &code, &8_u8),
            &Or::new(&code, &code, &notification),
            &Or::new(&register("OUTC"), &code, &Arg(0)),
        ],
    ));
    let children: Vec<&dyn Aml> = vec![&hid, &uid, &crs, &region, &fields, &status, &outcome];
    in_system_bus(&Device::new(path("CPUC"), children), aml);
}

/// The methods that notify a processor, and each about which something is unseen, and say that it is seen.
fn look(hardware: &Hardware, sink: &mut Vec<u8>) {
    let mut notify = Vec::new();
    for (uid, _) in (0_u32..).zip(&hardware.cpus) {
        If::new(
            &Equal::new(&Arg(0), &uid),
            vec![&Notify::new(&path(&name(uid)), &Arg(1))],
        )
        .to_aml_bytes(&mut notify);
    }
    Method::new(path("CNTF"), 2, true, vec![&Bytes(notify)]).to_aml_bytes(sink);

    let event = register("EVNT");
    let (seen, cpu, notification) = (Local(0), Local(1), Local(2));
    let take = Store::new(&seen, &event);
    let tell = MethodCall::new(path("CNTF"), vec![&cpu, &notification]);
    let each = Bytes::of(&While::new(
        &seen,
        vec![
            &Store::new(&event, &seen),
            &And::new(&cpu, &seen, &0xffff_u16),
            &ShiftRight::new(&notification, &seen, &16_u8),
            &tell,
            &take,
        ],
    ));
    Method::new(path("CSCN"), 0, true, vec![&take, &each]).to_aml_bytes(sink);
}

/// The generic event device. §5.6.9.
fn event_device(aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &"ACPI0013");
    let uid = Name::new(path("_UID"), &1_u8);
    // Level-triggered, active high: for as long as something is unseen.
    let interrupt = Interrupt::new(true, false, false, false, gsi::CPU_HOTPLUG);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(vec![&interrupt]));
    let look = MethodCall::new(path("\\_SB_.CSCN"), vec![]);
    let event = Bytes::of(&Method::new(
        path("_EVT"),
        1,
        true,
        vec![&If::new(
            &Equal::new(&Arg(0), &gsi::CPU_HOTPLUG),
            vec![&look],
        )],
    ));
    in_system_bus(
        &Device::new(path("GED1"), vec![&hid, &uid, &crs, &event]),
        aml,
    );
}
