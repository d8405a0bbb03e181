//! What the kernel says of a hot reset, read: whom it touches, and whose they are.

use busway_pci::{Bdf, Bus, Device, Function, Segment};
use vfio_bindings::bindings::vfio::{VFIO_PCI_DEVID_NOT_OWNED, VFIO_PCI_HOT_RESET_FLAG_DEV_ID};

/// A function that a hot reset touches, as the kernel names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Dependent {
    pub(crate) address: Bdf,
    pub(crate) owner: Owner,
}

/// What the kernel says of its owner: the one or the other, by how the device was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// Whoever holds this group.
    Group(u32),
    /// The device is bound to an iommufd.
    Iommufd {
        /// It is the iommufd that the asking device is bound to, too.
        ours: bool,
    },
}

/// Reads the words of a `vfio_pci_hot_reset_info` for a device on `segment`: the kernel cuts segments
/// off at 16 bits, and a bus is on one segment.
pub(crate) fn parse(words: &[u32], segment: Segment) -> Vec<Dependent> {
    let [_argsz, flags, count, devices @ ..] = words else {
        return Vec::new();
    };
    let by_iommufd = flags & VFIO_PCI_HOT_RESET_FLAG_DEV_ID != 0;
    devices
        .chunks_exact(2)
        .take(*count as usize)
        .filter_map(|words| {
            let &[id, place] = words else { return None };
            // A 16-bit segment, bus, and device with function.
            let [_, _, bus, devfn] = place.to_ne_bytes();
            Some(Dependent {
                address: Bdf {
                    segment,
                    bus: Bus(bus),
                    device: Device::new(devfn >> 3)?,
                    function: Function::new(devfn & 7)?,
                },
                owner: match by_iommufd {
                    true => Owner::Iommufd {
                        ours: id != VFIO_PCI_DEVID_NOT_OWNED as u32,
                    },
                    false => Owner::Group(id),
                },
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn place(segment: u16, bus: u8, devfn: u8) -> u32 {
        let [low, high] = segment.to_ne_bytes();
        u32::from_ne_bytes([low, high, bus, devfn])
    }

    #[test]
    fn a_device_opened_by_its_group_names_the_groups() {
        let words = [28, 0, 2, 7, place(0, 2, 0x08), 9, place(0, 2, 0x11)];
        let found = parse(&words, Segment(0));
        let addresses: Vec<_> = found.iter().map(|each| each.address.to_string()).collect();
        assert_eq!(addresses, ["0000:02:01.0", "0000:02:02.1"]);
        assert_eq!(found[1].owner, Owner::Group(9));
    }

    #[test]
    fn a_character_device_says_what_its_iommufd_owns() {
        let flags = VFIO_PCI_HOT_RESET_FLAG_DEV_ID;
        // A device of the iommufd, one of a group of its, and somebody else's.
        let words = [
            36,
            flags,
            3,
            5,
            place(0, 1, 0),
            0,
            place(0, 1, 1),
            u32::MAX,
            place(0, 1, 2),
        ];
        let found = parse(&words, Segment(0x10000));
        let ours: Vec<_> = found
            .iter()
            .map(|each| each.owner == Owner::Iommufd { ours: true })
            .collect();
        assert_eq!(ours, [true, true, false]);
        assert_eq!(found[0].address.to_string(), "10000:01:00.0");
    }

    proptest! {
        #[test]
        fn no_answer_is_too_odd(words in prop::collection::vec(any::<u32>(), 0..12)) {
            parse(&words, Segment(0));
        }
    }
}
