//! The differentiated system description table: the namespace. §5.2.11.1.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    If, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder,
    ResourceTemplate, Return, Store, Uuid,
};
use acpi_tables::sdt::Sdt;
use busway_pci::{Device as Slot, InterruptPin};

use super::aml::Bytes;
use super::{
    Hardware, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Root, cpus, hotplug, in_system_bus, memory, path,
};
use crate::arch::{acpi as arch, gsi};

/// Size of the header that each table has.
const HEADER: u32 = 36;
/// Revision 2: integers are 64 bits wide.
const REVISION: u8 = 2;

/// `_OSC` of a PCI host bridge. PCI Firmware 3.3 §4.5.1.
const OSC_UUID: &str = "33DB4D5B-1FF7-401C-9657-7441C03DD766";
/// Bits of the control field: what the operating system may take over. Table 4-6.
const OSC_NATIVE_HOTPLUG: u32 = 1 << 0;
const OSC_PME: u32 = 1 << 2;
const OSC_AER: u32 = 1 << 3;
const OSC_CAPABILITY: u32 = 1 << 4;
/// Bits of the status field. ACPI §6.2.12.1.
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_CONTROL_MASKED: u8 = 1 << 4;

/// The table.
pub(super) fn dsdt(hardware: &Hardware) -> Sdt {
    let mut aml = Vec::new();
    for root in &hardware.roots {
        host_bridge(root, hardware, &mut aml);
    }
    motherboard(hardware, &mut aml);
    arch::append_devices(hardware.serial, &mut aml);
    if hardware.tpm {
        arch::append_tpm(&mut aml);
    }
    cpus::append(hardware, &mut aml);
    memory::append(hardware, &mut aml);
    hotplug::append(&hardware.roots, &mut aml);
    let soft_off = arch::soft_off();
    Name::new(
        path("_S5_"),
        &Package::new(vec![&soft_off, &soft_off, &0_u8, &0_u8]),
    )
    .to_aml_bytes(&mut aml);

    let mut dsdt = Sdt::new(
        *b"DSDT",
        HEADER,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    dsdt.append_slice(&aml);
    dsdt
}

/// Bus 0 of a segment and all behind it. PCI Firmware 3.3 §4.
fn host_bridge(root: &Root, hardware: &Hardware, aml: &mut Vec<u8>) {
    let buses = AddressSpace::new_bus_number(0_u16, root.last_bus.into());
    let last_port = u16::try_from(root.io.end.saturating_sub(1)).unwrap_or(u16::MAX);
    let (configuration, [io_low, io_high]) = arch::host_bridge_ports(last_port);
    let io = AddressSpace::new_io(u16::try_from(root.io.start).unwrap_or(0), last_port, None);
    // A descriptor for each part of a window: what lies between them is in none.
    let uncached = AddressSpaceCacheable::NotCacheable;
    let parts = |window: &[Range<u64>]| {
        let mut parts = window.to_vec();
        parts.retain(|part| !part.is_empty());
        parts
    };
    let windows32: Vec<_> = parts(&root.mmio32)
        .into_iter()
        .map(|part| {
            let (first, last) = (part.start as u32, (part.end - 1) as u32);
            AddressSpace::new_memory(uncached, true, first, last, None)
        })
        .collect();
    let windows64: Vec<_> = parts(&root.mmio64)
        .into_iter()
        .map(|part| AddressSpace::new_memory(uncached, true, part.start, part.end - 1, None))
        .collect();
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    match root.segment {
        // The ports at 0xCF8 reach this one alone.
        0 => resources.extend([&configuration as &dyn Aml, &io_low, &io_high]),
        _ if root.io.is_empty() => {}
        _ => resources.push(&io),
    }
    resources.extend(windows32.iter().map(|part| part as &dyn Aml));
    resources.extend(windows64.iter().map(|part| part as &dyn Aml));

    let hid = Name::new(path("_HID"), &EISAName::new("PNP0A08"));
    let cid = Name::new(path("_CID"), &EISAName::new("PNP0A03"));
    let segment = Name::new(path("_SEG"), &root.segment);
    let bus = Name::new(path("_BBN"), &0_u8);
    let uid = Name::new(path("_UID"), &root.segment);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(resources));
    let routing = routing(root);
    let osc = Osc::new(hardware);
    let proximity = root.node.map(|node| Name::new(path("_PXM"), &node));
    let mut children: Vec<&dyn Aml> = vec![&hid, &cid, &segment, &bus, &uid, &crs, &routing, &osc];
    // §6.2.14.
    children.extend(proximity.iter().map(|name| name as &dyn Aml));
    in_system_bus(&Device::new(path(&root.name()), children), aml);
}

/// `_PRT` of a segment: pins are wired alike in all, so that the table is in the first alone. §6.2.13.
fn routing(root: &Root) -> Bytes {
    match root.segment {
        0 => Bytes::of(&Name::new(path("_PRT"), &interrupt_routing())),
        _ => {
            let first = path("\\_SB_.PCI0._PRT");
            Bytes::of(&Method::new(
                path("_PRT"),
                0,
                false,
                vec![&Return::new(&first)],
            ))
        }
    }
}

/// Each pin of each device is hard-wired to an interrupt.
fn interrupt_routing() -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for slot in (0..Slot::COUNT).filter_map(Slot::new) {
        for pin in InterruptPin::ALL {
            // All functions of the device.
            let address = u32::from(slot.number()) << 16 | 0xffff;
            let number = pin.register() - 1;
            table.add_element(&Package::new(vec![
                &address,
                &number,
                &0_u8,
                &gsi::intx(slot, pin),
            ]));
        }
    }
    table
}

/// `_OSC`: there is no firmware that works behind the operating system's back, so it may control
/// power management events, errors and the PCIe capability; and hot-plug where slots have it. Not
/// offered are what the machine lacks: SHPC, LTR and DPC.
struct Osc {
    control: u32,
}

impl Osc {
    fn new(hardware: &Hardware) -> Self {
        let mut control = OSC_PME | OSC_AER | OSC_CAPABILITY;
        if hardware.native_hotplug {
            control |= OSC_NATIVE_HOTPLUG;
        }
        Self { control }
    }
}

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let (uuid, revision, buffer) = (Arg(0), Arg(1), Arg(3));
        let (status, control, granted) = (path("STAT"), path("CTRL"), Local(0));
        let field = |name: &str| Name::new_field_name(name);
        Method::new(
            path("_OSC"),
            4,
            // It makes names, so only one call at a time.
            true,
            vec![
                &CreateDWordField::new(&field("STAT"), &buffer, &0_u8),
                &If::new(
                    &Equal::new(&uuid, &Uuid::new(OSC_UUID)),
                    vec![
                        &CreateDWordField::new(&field("CTRL"), &buffer, &8_u8),
                        &And::new(&granted, &control, &self.control),
                        &If::new(
                            &NotEqual::new(&revision, &1_u8),
                            vec![&Or::new(&status, &status, &OSC_UNKNOWN_REVISION)],
                        ),
                        &If::new(
                            &NotEqual::new(&granted, &control),
                            vec![&Or::new(&status, &status, &OSC_CONTROL_MASKED)],
                        ),
                        &Store::new(&control, &granted),
                    ],
                ),
                &Else::new(vec![&Or::new(&status, &status, &OSC_UNKNOWN_UUID)]),
                &Return::new(&buffer),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// What no device has but nobody else may take: ECAM of each segment (PCI Firmware 3.3 §4.1.2 wants it here) and the
/// ports of the board.
fn motherboard(hardware: &Hardware, aml: &mut Vec<u8>) {
    let hid = Name::new(path("_HID"), &EISAName::new("PNP0C02"));
    let uid = Name::new(path("_UID"), &0_u8);
    let ecams = hardware.roots.iter().map(|root| {
        let size = root.ecam.end.saturating_sub(root.ecam.start);
        Memory32Fixed::new(true, root.ecam.start as u32, size as u32)
    });
    let ecams: Vec<_> = ecams.collect();
    let ports = arch::board_ports();
    let mut resources: Vec<&dyn Aml> = ecams.iter().map(|ecam| ecam as &dyn Aml).collect();
    resources.push(&ports);
    let crs = Name::new(path("_CRS"), &ResourceTemplate::new(resources));
    in_system_bus(&Device::new(path("MBRD"), vec![&hid, &uid, &crs]), aml);
}
