//! The memory controller hub: the host bridge at 00:00.0. Intel 3 Series Express Chipset Family datasheet, §5.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{Bars, ConfigSpace, Identity, PciFunction};

use super::{SUBSYSTEM, SUBSYSTEM_VENDOR};

/// Base, size and enable of configuration space in memory, eight bytes. §5.1.18, PCIEXBAR.
const PCIEXBAR: u16 = 0x60;
const PCIEXBAR_ENABLE: u64 = 1 << 0;
const PCIEXBAR_LENGTH_SHIFT: u64 = 1;
const PCIEXBAR_LENGTH: u64 = 0b11;
/// Bits 35 to 26; those that a larger size does not use are ignored.
const PCIEXBAR_BASE: u64 = 0xf_fc00_0000;
/// What of it can be written.
const PCIEXBAR_WRITABLE: u64 =
    PCIEXBAR_BASE | PCIEXBAR_LENGTH << PCIEXBAR_LENGTH_SHIFT | PCIEXBAR_ENABLE;

/// Programmable attributes of the memory below 1 MiB, seven bytes: firmware sets them to reach RAM there,
/// which it does here at any time. §5.1.20, PAM0.
const PAM: Range<u16> = 0x90..0x97;
/// System management RAM control, which is not there: no write takes. §5.1.27.
const SMRAM: u16 = 0x9d;

/// Whoever has to know where configuration space is in memory. Called on a vCPU thread, with the functions'
/// locks free.
pub trait EcamListener: Send + Sync {
    /// It is there from now on, or nowhere.
    fn ecam_moved(&self, place: Option<Range<u64>>);
}

/// The host bridge.
pub struct Mch {
    space: Mutex<ConfigSpace>,
    listener: Arc<dyn EcamListener>,
}

impl fmt::Debug for Mch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mch")
            .field("ecam", &self.ecam())
            .finish_non_exhaustive()
    }
}

impl Mch {
    /// The host bridge; `listener` hears where configuration space is.
    #[must_use]
    pub fn new(listener: Arc<dyn EcamListener>) -> Self {
        let identity = Identity {
            vendor: 0x8086,
            device: 0x29c0,
            class: 0x06_00_00,
            subsystem_vendor: SUBSYSTEM_VENDOR,
            subsystem: SUBSYSTEM,
            ..Identity::default()
        };
        let mut space = ConfigSpace::type0(&identity, Bars::new());
        space.define(PCIEXBAR, 0, PCIEXBAR_WRITABLE);
        for register in PAM {
            space.define(register, 0_u8, 0x33_u8);
        }
        space.define(SMRAM, 0x02_u8, 0);
        Self {
            space: Mutex::new(space),
            listener,
        }
    }

    /// Where configuration space is in memory, if it is.
    #[must_use]
    pub fn ecam(&self) -> Option<Range<u64>> {
        place(self.space().get(PCIEXBAR))
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to the registers, and says where configuration space is if that changed it.
    fn change(&self, change: impl FnOnce(&mut ConfigSpace)) {
        let mut space = self.space();
        let before = place(space.get(PCIEXBAR));
        change(&mut space);
        let after = place(space.get(PCIEXBAR));
        drop(space);
        if before != after {
            self.listener.ecam_moved(after);
        }
    }
}

/// What the register says; sizes are 256, 128 and 64 MiB, and the fourth is reserved.
fn place(register: u64) -> Option<Range<u64>> {
    if register & PCIEXBAR_ENABLE == 0 {
        return None;
    }
    let size = match register >> PCIEXBAR_LENGTH_SHIFT & PCIEXBAR_LENGTH {
        0 => 256 << 20,
        1 => 128 << 20,
        2 => 64 << 20,
        _ => return None,
    };
    let start = register & PCIEXBAR_BASE & !(size - 1);
    Some(start..start + size)
}

impl PciFunction for Mch {
    fn name(&self) -> String {
        "the host bridge".to_owned()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.space().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.change(|space| space.write(offset, data));
    }

    fn reset(&self) {
        self.change(ConfigSpace::reset);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<Option<Range<u64>>>>);

    impl EcamListener for Heard {
        fn ecam_moved(&self, place: Option<Range<u64>>) {
            self.0.lock().unwrap().push(place);
        }
    }

    fn mch() -> (Arc<Heard>, Mch) {
        let heard = Arc::new(Heard::default());
        (heard.clone(), Mch::new(heard))
    }

    fn write(mch: &Mch, offset: u16, value: u32) {
        mch.config_write(offset, &value.to_le_bytes());
    }

    #[test]
    fn it_is_the_one_that_firmware_knows() {
        let (_, mch) = mch();
        let mut data = [0; 4];
        mch.config_read(0, &mut data);
        assert_eq!(data, [0x86, 0x80, 0xc0, 0x29]);
        mch.config_read(0x2c, &mut data);
        assert_eq!(data, [0xf4, 0x1a, 0x00, 0x11]);
    }

    #[test]
    fn configuration_space_is_where_firmware_puts_it_and_nowhere_after_a_reset() {
        let (heard, mch) = mch();
        assert_eq!(mch.ecam(), None);
        // As OVMF does: disabled, the high half, then the low one.
        write(&mch, 0x60, 0);
        write(&mch, 0x64, 0);
        write(&mch, 0x60, 0xe000_0001);
        assert_eq!(mch.ecam(), Some(0xe000_0000..0xf000_0000));
        write(&mch, 0x60, 0xb000_0001);
        write(&mch, 0x60, 0xb000_0001);
        mch.reset();
        let expected = [
            Some(0xe000_0000..0xf000_0000),
            Some(0xb000_0000..0xc000_0000),
            None,
        ];
        assert_eq!(*heard.0.lock().unwrap(), expected);
    }

    #[test]
    fn smaller_sizes_are_smaller_and_the_reserved_one_is_none() {
        let (_, mch) = mch();
        write(&mch, 0x60, 0xe800_0003);
        assert_eq!(mch.ecam(), Some(0xe800_0000..0xf000_0000));
        write(&mch, 0x60, 0xec00_0005);
        assert_eq!(mch.ecam(), Some(0xec00_0000..0xf000_0000));
        write(&mch, 0x60, 0xec00_0007);
        assert_eq!(mch.ecam(), None);
    }

    proptest! {
        #[test]
        fn any_write_is_taken_and_a_place_is_aligned(
            writes in proptest::collection::vec((0_u16..0x100, any::<[u8; 4]>()), 0..60)
        ) {
            let (_, mch) = mch();
            for (offset, data) in writes {
                mch.config_write(offset & !3, &data);
                if let Some(place) = mch.ecam() {
                    prop_assert!(place.start.is_multiple_of(place.end - place.start));
                }
            }
        }
    }
}
