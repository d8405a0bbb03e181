//! Devices that are more than what PCI tells of them: a guest that has one has only a part of it.
//!
//! Such a device binds, opens and appears in the guest like any other, and its driver there fails, or
//! does without what it needs, for a reason that nothing in the guest names. So it is said before. A row
//! says what is missing and what comes of it; where a device works whole, it has none.

use busway_iommu::Command;

use super::device::HostDevice;
use super::finding::{Finding, Level, Remedy};

const TOPIC: &str = "partly";

/// A kind of device of which a guest has a part only.
struct Kind {
    level: Level,
    is: fn(&HostDevice) -> bool,
    /// What is missing, and what comes of it.
    text: &'static str,
    remedy: fn(&HostDevice) -> Remedy,
}

/// What a guest will not have of a device, where that is known of its kind.
pub(super) fn partly_served(device: &HostDevice) -> Option<Finding> {
    let kind = KINDS.iter().find(|kind| (kind.is)(device))?;
    let finding = Finding::new(kind.level, TOPIC, kind.text);
    Some(finding.remedy((kind.remedy)(device)))
}

const KINDS: &[Kind] = &[
    // QEMU, docs/igd-assign.txt. The virtual functions that it makes need neither.
    Kind {
        level: Level::Warning,
        is: is_intel_integrated_graphics,
        text: "these graphics are part of the processor: the board's list of its screens (the OpRegion) \
               and the RAM that the firmware set aside for them (stolen memory) stay the host's. Linux's \
               driver may work without, for computing and video; screens can stay dark, and Windows's \
               driver does not start",
        remedy: in_place_of_integrated_graphics,
    },
    // Linux, drivers/gpu/drm/amd/amdgpu/amdgpu_bios.c: from the ACPI table, which a guest does not have,
    // or from the ROM, which the device does not have.
    Kind {
        level: Level::Warning,
        is: is_amd_graphics_without_rom,
        text: "the BIOS of these graphics is not in the device but in a table of the host's firmware \
               (VFCT), which a guest does not have: amdgpu finds none (\"Unable to locate a BIOS ROM\") \
               and gives up",
        remedy: |device| {
            Remedy::words(format!(
                "save the image that /sys/firmware/acpi/tables/VFCT holds behind its headers to a file, \
                 and give it with the device: --device {},romfile=FILE",
                device.address
            ))
        },
    },
    // Linux, drivers/net/wireless/ath/ath11k/pcic.c, ath11k_pcic_get_msi_address, and ath12k's.
    Kind {
        level: Level::Warning,
        is: |device| device.vendor == 0x17cb && ATH11K_AND_12K.contains(&device.device),
        text: "its driver (ath11k or ath12k) tells the card's firmware the address of its interrupts, and \
               in a guest that is an address of the guest's, which the card does not reach: interrupts \
               do not arrive, and the driver gives up",
        remedy: |_| {
            Remedy::words(
                "leave it to the host and give the guest a bridged NIC, or another make of card",
            )
        },
    },
    // Linux, drivers/pci/controller/vmd.c, VMD_FEAT_HAS_MEMBAR_SHADOW_VSCAP: a hypervisor's capability.
    // 28c0 has registers for it instead.
    Kind {
        level: Level::Warning,
        is: |device| {
            device.vendor == 0x8086 && device.class >> 8 == RAID && VMD.contains(&device.device)
        },
        text: "this kind of VMD does not tell a guest where its memory is on the host, which the guest's \
               driver has to know to set up the bridges behind it: the guest sees the drives there and \
               does not reach them",
        remedy: |_| {
            Remedy::words(
                "turn VMD off for these slots in the firmware's set-up, and give the guest the drives",
            )
        },
    },
    // USB4 1.0 §11.3: tunnels of PCI Express end in bridges that are functions beside the host interface.
    Kind {
        level: Level::Warning,
        is: |device| device.class == USB4 || device.driver.as_deref() == Some("thunderbolt"),
        text: "it only connects what is plugged in: devices of PCI Express behind a Thunderbolt or USB4 \
               port (docks, graphics cards, drives) appear on the host's buses all the same, not in the \
               guest",
        remedy: |_| {
            Remedy::command(
                "leave it to the host, and give the guest what is plugged in, by its own address",
                Command::new(["busway", "device", "list", "--tree"]),
            )
        },
    },
    // CXL 3.1 §8.2.4.20: what maps it are registers of the host's bridges, and no BAR.
    Kind {
        level: Level::Warning,
        is: |device| device.class >> 8 == CXL_MEMORY,
        text: "its memory is not in its BARs: the host's CXL bridges map it, which a guest does not have. \
               The guest sees the device, and none of its memory",
        remedy: |_| {
            Remedy::words(
                "leave it to the host's cxl drivers, which make it memory of a NUMA node, and give \
                 guests RAM from there",
            )
        },
    },
    // PCI IDE Controller Specification 1.0 §2: ports 0x1f0 and 0x170, interrupts 14 and 15.
    Kind {
        level: Level::Warning,
        is: |device| device.class >> 8 == IDE && device.class & IDE_NATIVE != IDE_NATIVE,
        text: "it is in compatibility mode: its ports and interrupts are those of old (0x1f0 and 14, 0x170 \
               and 15), which are not the device's own and not passed on. The guest finds no drive",
        remedy: |_| {
            Remedy::words("set the controller to AHCI, or to native mode, in the firmware's set-up")
        },
    },
    // Linux, sound/soc/sof/intel: the NHLT and SoundWire's properties.
    Kind {
        level: Level::Note,
        is: |device| device.vendor == 0x8086 && is_audio_dsp(device.class),
        text: "which digital microphones and SoundWire speakers the board has stands in tables of the \
               host's firmware (ACPI), which a guest does not have: it may find jacks and HDMI only",
        remedy: |_| Remedy::words("a USB sound device can be given with its USB controller"),
    },
];

// Classes. PCI Code and ID Assignment 1.15 §1.
const DISPLAY: u32 = 0x03;
const VGA: u32 = 0x0300;
const OTHER_DISPLAY: u32 = 0x0380;
const IDE: u32 = 0x0101;
const RAID: u32 = 0x0104;
const AUDIO: u32 = 0x0401;
const HD_AUDIO_WITH_DSP: u32 = 0x04_03_80;
const CXL_MEMORY: u32 = 0x0502;
const USB4: u32 = 0x0c_03_40;
/// Programming interface of IDE: both channels are in native mode.
const IDE_NATIVE: u32 = 0b0101;

/// QCA6390, WCN6855, QCN9074, WCN7850 and QCN9274.
const ATH11K_AND_12K: [u16; 5] = [0x1101, 0x1103, 0x1104, 0x1107, 0x1109];

/// Intel's volume management devices, but for 28c0. Linux, drivers/pci/controller/vmd.c, vmd_ids
const VMD: [u16; 10] = [
    0x201d, 0x467f, 0x4c3d, 0x7d0b, 0x9a0b, 0xa77f, 0xad0b, 0xb06f, 0xb07f, 0xb60b,
];

/// Those on a root bus: cards are behind a bridge.
fn is_intel_integrated_graphics(device: &HostDevice) -> bool {
    device.vendor == 0x8086
        && device.class >> 16 == DISPLAY
        && device.parent.is_none()
        && device.physical_function.is_none()
}

/// Its own virtual functions, where it makes some.
fn in_place_of_integrated_graphics(device: &HostDevice) -> Remedy {
    match &device.sriov {
        Some(sriov) if sriov.total > 0 => Remedy::command(
            "leave it to the host and give the guest a virtual function of it, which needs neither \
             (its driver on the host has to have been made for that)",
            Command::new(["busway", "device", "vfs"])
                .operand(device.address.to_string())
                .operand("1"),
        ),
        _ => Remedy::words(
            "give the guest a graphics card, or use these for computing and video and see the guest by \
             network",
        ),
    }
}

/// What is in a processor has no expansion ROM; a card has one. What BARs there are has to be known.
fn is_amd_graphics_without_rom(device: &HostDevice) -> bool {
    const ROM: u8 = 6;
    device.vendor == 0x1002
        && matches!(device.class >> 8, VGA | OTHER_DISPLAY)
        && device.physical_function.is_none()
        && !device.resources.is_empty()
        && device.resources.iter().all(|range| range.index != ROM)
}

fn is_audio_dsp(class: u32) -> bool {
    class >> 8 == AUDIO || class == HD_AUDIO_WITH_DSP
}
