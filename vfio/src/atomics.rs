//! Which AtomicOps of a device's the host carries out. PCIe 6.0 §6.15
//!
//! A device sends AtomicOps to the root port that it is behind, through every bridge between. What of
//! them works there the kernel's VFIO says from Linux 6.5 on; for an older one the bridges' registers
//! are read, by the kernel's own rules (drivers/pci/pci.c, pci_enable_atomic_ops_to_root, and
//! drivers/vfio/pci/vfio_pci_core.c, vfio_pci_info_atomic_cap).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use busway_iommu::info;
use busway_pci::{AtomicOps, Bdf, ConfigRead, capabilities, spec};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_CAPS, VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP, VFIO_PCI_ATOMIC_COMP32,
    VFIO_PCI_ATOMIC_COMP64, VFIO_PCI_ATOMIC_COMP128, vfio_device_info,
    vfio_device_info_cap_pci_atomic_comp,
};

/// What VFIO's answer about a device (a `vfio_device_info` and the capabilities behind it) says. Nothing
/// where it has no such capability: the kernel is older, or the host carries out none.
pub(crate) fn of_info(answer: &[u8]) -> Option<AtomicOps> {
    let u32_at = |at| info::u32_at(answer, at);
    let flags = u32_at(std::mem::offset_of!(vfio_device_info, flags))?;
    if flags & VFIO_DEVICE_FLAGS_CAPS == 0 {
        return None;
    }
    let first = u32_at(std::mem::offset_of!(vfio_device_info, cap_offset))?;
    let id = VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP as u16;
    let capability = info::capability(answer, first, id)?;
    let at = std::mem::offset_of!(vfio_device_info_cap_pci_atomic_comp, flags);
    let said = info::u32_at(capability, at)?;
    let sizes = [
        (VFIO_PCI_ATOMIC_COMP32, spec::EXP_ATOMIC_COMPLETER_32),
        (VFIO_PCI_ATOMIC_COMP64, spec::EXP_ATOMIC_COMPLETER_64),
        (VFIO_PCI_ATOMIC_COMP128, spec::EXP_ATOMIC_COMPLETER_128),
    ];
    let sizes = sizes.into_iter().filter(|(bit, _)| said & bit != 0);
    let register = sizes.fold(0, |register, (_, bit)| register | bit);
    Some(AtomicOps::from_capabilities(register))
}

/// What the bridges above the device whose folder in sysfs is `folder`, and whose configuration space
/// is `config`, let through and carry out. None where that cannot be read, which takes CAP_SYS_ADMIN.
pub(crate) fn of_path(folder: &Path, config: &impl ConfigRead) -> AtomicOps {
    path(folder, config).unwrap_or(AtomicOps::NONE)
}

fn path(folder: &Path, config: &impl ConfigRead) -> Option<AtomicOps> {
    // A virtual function's requests are its physical function's to enable. PCIe 6.0 §9.3.5.10
    if folder.join("physfn").exists() {
        return None;
    }
    let device = Express::read(config)?;
    if !matches!(device.kind, ENDPOINT | LEGACY_ENDPOINT) {
        return None;
    }
    let folder = folder.canonicalize().ok()?;
    let is_function = |folder: &&Path| {
        let name = folder.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.parse::<Bdf>().is_ok())
    };
    let above = folder.ancestors().skip(1);
    for bridge in above.take_while(is_function) {
        let config = File::open(bridge.join("config")).ok()?;
        let dword = |offset: u16| {
            let mut data = [0; 4];
            match config.read_exact_at(&mut data, offset.into()) {
                Ok(()) => u32::from_le_bytes(data),
                Err(_) => u32::MAX,
            }
        };
        let bridge = Express::read(&dword)?;
        match bridge.kind {
            // As the kernel does, only for sizes that the device itself has a use for.
            ROOT_PORT => return Some(bridge.completes().and(device.completes())),
            UPSTREAM_PORT | DOWNSTREAM_PORT if !bridge.routes() => return None,
            UPSTREAM_PORT if bridge.blocks() => return None,
            UPSTREAM_PORT | DOWNSTREAM_PORT => {}
            // A bridge to conventional PCI, which has no AtomicOps.
            _ => return None,
        }
    }
    None
}

// Device/port type. PCIe 6.0 §7.5.3.2
const ENDPOINT: u16 = 0b0000;
const LEGACY_ENDPOINT: u16 = 0b0001;
const ROOT_PORT: u16 = spec::EXP_TYPE_ROOT_PORT >> spec::EXP_TYPE_SHIFT;
const UPSTREAM_PORT: u16 = 0b0101;
const DOWNSTREAM_PORT: u16 = 0b0110;

/// What a PCI Express capability says of AtomicOps.
struct Express {
    kind: u16,
    /// Device capabilities 2.
    capabilities: u32,
    /// Device control 2.
    control: u16,
}

impl Express {
    /// That of a function; nothing where it has none, or one without these registers.
    fn read(config: &impl ConfigRead) -> Option<Self> {
        let found = capabilities(config);
        let found = found.iter().find(|one| one.id == spec::CAP_PCI_EXPRESS)?;
        let dword = |offset: u16| config.read_dword(found.offset.saturating_add(offset));
        let flags = (dword(0) >> 16) as u16;
        let version = flags & 0xf;
        (version >= spec::EXP_VERSION_2).then(|| Self {
            kind: flags >> spec::EXP_TYPE_SHIFT & 0xf,
            capabilities: dword(spec::EXP_DEVICE_CAPABILITIES_2),
            control: dword(spec::EXP_DEVICE_CONTROL_2) as u16,
        })
    }

    fn completes(&self) -> AtomicOps {
        AtomicOps::from_capabilities(self.capabilities)
    }

    fn routes(&self) -> bool {
        self.capabilities & spec::EXP_ATOMIC_ROUTING != 0
    }

    fn blocks(&self) -> bool {
        self.control & spec::EXP_ATOMIC_EGRESS_BLOCKING != 0
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    const ALL: AtomicOps = AtomicOps::from_capabilities(spec::EXP_ATOMIC_COMPLETER);
    const BOTH: u32 = spec::EXP_ATOMIC_COMPLETER_32 | spec::EXP_ATOMIC_COMPLETER_64;

    /// A `vfio_device_info` with a capability that means nothing here, and AtomicOps with these flags.
    fn answer(flags: u32, atomics: u32) -> Vec<u8> {
        let words = [
            48,
            flags,
            9,
            5,
            24,
            0,
            99 | 1 << 16,
            32,
            5 | 1 << 16,
            0,
            atomics,
            0,
        ];
        words
            .iter()
            .flat_map(|word: &u32| word.to_ne_bytes())
            .collect()
    }

    #[test]
    fn what_vfio_says_is_told_size_by_size() {
        let caps = VFIO_DEVICE_FLAGS_CAPS;
        let sizes = [(1, 1 << 7), (2, 1 << 8), (4, 1 << 9), (3, BOTH), (0xf8, 0)];
        for (said, register) in sizes {
            let found = of_info(&answer(caps, said)).unwrap();
            assert_eq!(found.register(), register);
        }
        assert_eq!(of_info(&answer(2, 7)), None);
        // An answer that is cut short, or of an older kernel.
        let whole = answer(caps, 7);
        assert_eq!(of_info(&whole), Some(ALL));
        for length in 0..44 {
            assert_eq!(of_info(&whole[..length]), None, "{length}");
        }
    }

    /// A configuration space with a PCI Express capability at 0x40.
    fn space(kind: u16, capabilities: u32, control: u32) -> Vec<u8> {
        let mut bytes = vec![0; 256];
        let mut put = |at: usize, value: u32| {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        };
        put(0x04, 0x0010_0000);
        put(0x34, 0x40);
        put(0x40, (u32::from(kind) << 4 | 2) << 16 | 0x10);
        put(0x64, capabilities);
        put(0x68, control);
        bytes
    }

    /// What is found for a device with all completers below bridges that have these spaces, the
    /// topmost first.
    fn below(bridges: &[Vec<u8>], device: &[u8]) -> AtomicOps {
        let root = tempfile::tempdir().unwrap();
        let mut folder: PathBuf = root.path().join("pci0000:00");
        for (number, space) in bridges.iter().enumerate() {
            folder.push(format!("0000:{number:02x}:01.0"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("config"), space).unwrap();
        }
        folder.push("0000:20:00.0");
        fs::create_dir_all(&folder).unwrap();
        let dword = |offset: u16| {
            let at = usize::from(offset);
            u32::from_le_bytes(device[at..at + 4].try_into().unwrap())
        };
        of_path(&folder, &dword)
    }

    #[test]
    fn every_bridge_on_the_way_has_to_let_atomic_ops_through() {
        let routing = spec::EXP_ATOMIC_ROUTING;
        let gpu = space(ENDPOINT, spec::EXP_ATOMIC_COMPLETER, 0);
        let root = space(ROOT_PORT, BOTH, 0);
        let both = AtomicOps::from_capabilities(BOTH);
        assert_eq!(below(std::slice::from_ref(&root), &gpu), both);
        let up = space(UPSTREAM_PORT, routing, 0);
        let down = space(DOWNSTREAM_PORT, routing, 0);
        let path = [root.clone(), up.clone(), down.clone()];
        assert_eq!(below(&path, &gpu), both);
        let narrow = space(LEGACY_ENDPOINT, spec::EXP_ATOMIC_COMPLETER_32, 0);
        assert_eq!(below(&path, &narrow).register(), 1 << 7);
        let none = AtomicOps::NONE;
        for (bridge, other) in [
            (1, space(UPSTREAM_PORT, 0, 0)),
            (2, space(DOWNSTREAM_PORT, 0, 0)),
            (1, space(UPSTREAM_PORT, routing, 1 << 7)),
            // A bridge to conventional PCI, and one of which an ordinary user sees the header only.
            (2, space(0b0111, routing, 0)),
            (0, root[..64].to_vec()),
            (0, space(ROOT_PORT, 0, 0)),
        ] {
            let mut path = path.clone();
            path[bridge] = other;
            assert_eq!(below(&path, &gpu), none, "{bridge}");
        }
        // Nothing is above, or it is no endpoint, or the capability is of version 1.
        assert_eq!(below(&[], &gpu), none);
        let integrated = space(0b1001, spec::EXP_ATOMIC_COMPLETER, 0);
        assert_eq!(below(&path, &integrated), none);
        let mut old = gpu.clone();
        old[0x42] = 1;
        assert_eq!(below(&path, &old), none);
        assert_eq!(below(&path, &vec![0xff; 256]), none);
    }
}
