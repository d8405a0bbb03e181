//! Devices as they were recorded, and as VFIO shows them.

use busway_pci::{capabilities, extended_capabilities};

use super::FakeDevice;
use crate::IrqInfo;

impl FakeDevice {
    /// A device as it was recorded: lines of sysfs's `resource`, then of `lspci -xxxx`, with what VFIO
    /// fills in for it: the BARs' kinds, and a VF's identity.
    pub(crate) fn recorded(text: &str) -> Self {
        let mut fake = Self::default();
        let (resources, dump): (Vec<_>, Vec<_>) =
            text.lines().partition(|line| line.starts_with("0x"));
        let hex = |digits: &str| u64::from_str_radix(digits.trim_start_matches("0x"), 16).unwrap();
        for line in dump {
            let (offset, bytes) = line.split_once(": ").unwrap();
            let bytes: Vec<_> = bytes.split(' ').map(|byte| hex(byte) as u8).collect();
            fake.set_config(hex(offset) as usize, &bytes);
        }
        if fake.config_at(0) == [0xff; 4] {
            fake.set_config(0, &[0x86, 0x80, 0xca, 0x10]);
        }
        for (number, line) in resources.into_iter().enumerate() {
            let fields: Vec<_> = line.split(' ').map(hex).collect();
            let [start, end, flags] = fields[..] else {
                panic!("{line}");
            };
            if end == start {
                continue;
            }
            fake.set_bar(number, end - start + 1);
            // linux/ioport.h: I/O, prefetchable, 64-bit.
            let bit = |from: u64, to| if flags & from != 0 { to } else { 0 };
            let register = bit(0x100, 1) | bit(0x2000, 8) | bit(0x10_0000, 4);
            fake.set_config(0x10 + number * 4, &[register, 0, 0, 0]);
            if register & 1 != 0 {
                fake.bars[number].areas.clear();
            }
        }
        let vectors = IrqInfo {
            count: 2048,
            resizable: true,
        };
        (fake.msix, fake.msi) = (vectors, vectors);
        fake.intx.count = u32::from(fake.config_at::<1>(0x3d) != [0]);
        fake.unlink();
        fake
    }

    /// Takes what VFIO does not know out of the lists and leaves its bytes, as `vfio_cap_init` and
    /// `vfio_ecap_init` in Linux, drivers/vfio/pci/vfio_pci_config.c.
    pub(crate) fn unlink(&mut self) {
        const KNOWN: [u8; 11] = [
            0x01, 0x02, 0x03, 0x05, 0x07, 0x08, 0x09, 0x10, 0x11, 0x12, 0x13,
        ];
        const KNOWN_EXTENDED: [u16; 18] = [
            0x01, 0x02, 0x03, 0x04, 0x08, 0x09, 0x0b, 0x0d, 0x0e, 0x0f, 0x10, 0x12, 0x13, 0x15,
            0x16, 0x17, 0x18, 0x23,
        ];
        let config = self.config.lock().unwrap().clone();
        let dword = |offset: u16| {
            let bytes = config.get(usize::from(offset)..usize::from(offset) + 4);
            bytes.map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().unwrap()))
        };
        let mut link = 0x34;
        for found in capabilities(&dword) {
            let next = dword(found.offset).to_le_bytes()[1];
            if KNOWN.contains(&found.id) {
                link = usize::from(found.offset) + 1;
            }
            self.set_config(link, &[next]);
        }
        let mut before = None;
        for found in extended_capabilities(&dword) {
            let at = usize::from(found.offset);
            let next = dword(found.offset) & 0xffc0_0000;
            match before {
                _ if KNOWN_EXTENDED.contains(&found.id) => before = Some(at),
                None => {
                    self.set_config(at, &next.to_le_bytes());
                    before = Some(at);
                }
                Some(before) => {
                    let kept = u32::from_le_bytes(self.config_at(before)) & 0x000f_ffff;
                    self.set_config(before, &(kept | next).to_le_bytes());
                }
            }
        }
        self.own_config = Some(config);
    }
}
