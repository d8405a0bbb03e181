//! A device's two capability lists as the guest gets them: which stay, which go, and how far each
//! reaches. Nothing that the device says can make this fail; it can only leave less.
//!
//! VFIO has unlinked what it does not know, and leaves its bytes to be read and written as they are
//! (`vfio_cap_init` and `vfio_ecap_init` in Linux, drivers/vfio/pci/vfio_pci_config.c). Where they are
//! is known from the device's own lists, where the host shows these.

use busway_pci::{
    Capability, ConfigRead, ExtendedCapability, MsiFeatures, capabilities, extended_capabilities,
    spec,
};

use crate::policy::{self, Keep, Rule};

/// A capability's place: from `start` to before `end`. Never empty, and no two overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: u16,
    pub(crate) end: u16,
}

/// A capability that the guest sees.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kept {
    pub(crate) id: u16,
    pub(crate) version: u8,
    pub(crate) extent: Extent,
    pub(crate) rules: &'static [Rule],
    /// Nothing of it can be written.
    pub(crate) read_only: bool,
}

/// One list: what stays in it, in the device's order, and the bytes of what goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct List {
    pub(crate) kept: Vec<Kept>,
    pub(crate) hidden: Vec<Extent>,
}

impl List {
    /// Takes a capability out that turns out to be of no use.
    pub(crate) fn hide(&mut self, start: u16) {
        let extents = self.kept.iter().map(|kept| kept.extent);
        self.hidden
            .extend(extents.filter(|extent| extent.start == start));
        self.kept.retain(|kept| kept.extent.start != start);
    }

    /// Whether a capability could stand at `at`, `size` bytes long, in the list that starts in the
    /// header.
    pub(crate) fn is_free(&self, config: &impl ConfigRead, at: u16, size: u16) -> bool {
        let end = at.saturating_add(size);
        self.kept.iter().all(|kept| {
            let length = known_length(config, kept).min(kept.extent.end - kept.extent.start);
            end <= kept.extent.start || kept.extent.start.saturating_add(length) <= at
        })
    }

    /// Puts a capability at the list's end, where [`is_free`](Self::is_free) found room.
    pub(crate) fn append(&mut self, new: Kept) {
        for kept in &mut self.kept {
            if (kept.extent.start..kept.extent.end).contains(&new.extent.start) {
                kept.extent.end = new.extent.start;
            }
        }
        self.kept.push(new);
    }

    /// The first capability of a kind.
    pub(crate) fn find(&self, id: u16) -> Option<Kept> {
        self.kept.iter().find(|kept| kept.id == id).copied()
    }

    /// Each capability's start with that of the next, or zero.
    pub(crate) fn links(&self) -> impl Iterator<Item = (Kept, u16)> {
        let starts = self.kept.iter().map(|kept| kept.extent.start);
        let next = starts.skip(1).chain([0]);
        self.kept.iter().copied().zip(next)
    }
}

/// The list that starts in the header. `own` is the device's configuration space without VFIO; zeros
/// where the host does not show it.
pub(crate) fn standard(config: &impl ConfigRead, own: &impl ConfigRead) -> List {
    let walk = |list: Vec<Capability>| {
        let found = list.into_iter();
        found.map(|found| (u16::from(found.id), 0, found.offset))
    };
    let found = merge(walk(capabilities(config)), walk(capabilities(own)));
    let end = spec::EXTENDED_CONFIG_START;
    sort_out(&found, policy::CAPABILITIES, end, |id, offset| {
        standard_size(config, id, offset)
    })
}

/// The list that starts at 0x100; `own` as for [`standard`].
pub(crate) fn extended(config: &impl ConfigRead, own: &impl ConfigRead) -> List {
    let walk = |list: Vec<ExtendedCapability>| {
        let found = list.into_iter();
        found.map(|found| (found.id, found.version, found.offset))
    };
    let found = merge(
        walk(extended_capabilities(config)),
        walk(extended_capabilities(own)),
    );
    sort_out(
        &found,
        policy::EXTENDED,
        spec::CONFIG_SPACE_SIZE,
        |id, offset| extended_size(config, id, offset),
    )
}

/// A capability that was found: what, its version, where, and whether VFIO has it in its list.
type Found = (u16, u8, u16, bool);

/// VFIO's list, and what it unlinked. Where it could not (at 0x100, where the list starts), it shows a
/// null capability, which says nothing.
fn merge(
    linked: impl Iterator<Item = (u16, u8, u16)>,
    own: impl Iterator<Item = (u16, u8, u16)>,
) -> Vec<Found> {
    const NULL: u16 = 0;
    let mut found: Vec<Found> = linked
        .map(|(id, version, start)| (id, version, start, true))
        .collect();
    for (id, version, start) in own.filter(|(id, ..)| *id != NULL) {
        match found.iter_mut().find(|(_, _, other, _)| *other == start) {
            Some(place) if place.0 == NULL => *place = (id, version, start, false),
            Some(_) => {}
            None => found.push((id, version, start, false)),
        }
    }
    found
}

/// Leaves out what a function does not have that is on bus 0, a part of the root complex.
///
/// A legacy endpoint cannot be integrated (PCIe 6.0 §1.3.2.2), and Windows refuses such: it becomes a conventional
/// function. A conventional one stays what it is.
pub(crate) fn integrate(config: &impl ConfigRead, standard: &mut List, extended: &mut List) {
    let express = standard.find(spec::CAP_PCI_EXPRESS.into());
    if let Some(Kept { extent, .. }) = express
        && config.read_dword(extent.start) & policy::EXP_TYPE == policy::EXP_TYPE_LEGACY_ENDPOINT
    {
        standard.hide(extent.start);
    }
    let of_a_link = extended
        .kept
        .iter()
        .filter(|kept| policy::OF_A_LINK.contains(&kept.id))
        .map(|kept| kept.extent.start);
    for start in of_a_link.collect::<Vec<_>>() {
        extended.hide(start);
    }
}

fn sort_out(
    found: &[Found],
    rules: &'static [policy::CapabilityRule],
    end_of_space: u16,
    size: impl Fn(u16, u16) -> u16,
) -> List {
    let mut list = List::default();
    for &(id, version, start, linked) in found {
        let rule = policy::find(rules, id).map(|rule| rule.keep);
        let rule = match (rule, linked) {
            (rule, true) => rule.unwrap_or(Keep::Yes(&[])),
            // The guest does not find it in its list, so that there is nothing to be read either.
            (Some(Keep::ReadOnly(most) | Keep::No(most)), false) => Keep::No(most),
            // What the table keeps is as good as registers that are of no capability.
            (Some(Keep::Yes(_)) | None, false) => continue,
        };
        let size = match rule {
            Keep::Yes(_) => size(id, start),
            Keep::ReadOnly(most) | Keep::No(most) => most,
        };
        // Where capabilities overlap, each ends where the next one starts.
        let next = found
            .iter()
            .map(|&(_, _, other, _)| other)
            .filter(|&other| other > start)
            .min()
            .unwrap_or(end_of_space)
            .min(end_of_space);
        let extent = Extent {
            start,
            end: start.saturating_add(size.max(4)).min(next),
        };
        let (rules, read_only): (&[Rule], _) = match rule {
            Keep::Yes(rules) => (rules, false),
            Keep::ReadOnly(_) => (&[], true),
            Keep::No(_) => {
                list.hidden.push(extent);
                continue;
            }
        };
        list.kept.push(Kept {
            id,
            version,
            extent,
            rules,
            read_only,
        });
    }
    list
}

/// Bytes of a capability that has rules, so that these do not reach beyond it: some devices have
/// registers of their own between capabilities. For others as far as the next one.
fn standard_size(config: &impl ConfigRead, id: u16, offset: u16) -> u16 {
    const POWER_MANAGEMENT: u16 = spec::CAP_POWER_MANAGEMENT as u16;
    const EXPRESS: u16 = spec::CAP_PCI_EXPRESS as u16;
    const ADVANCED_FEATURES: u16 = spec::CAP_ADVANCED_FEATURES as u16;
    match id {
        POWER_MANAGEMENT => 8,
        ADVANCED_FEATURES => 6,
        // PCIe 1.1 §7.8: to the link's registers.
        EXPRESS if config.read_dword(offset) >> 16 & 0xf < 2 => 0x14,
        EXPRESS => spec::EXP_CAPABILITY_SIZE,
        _ => spec::EXTENDED_CONFIG_START,
    }
}

/// Bytes of an extended capability that the guest may write by its rules: no more than are surely its
/// own.
fn extended_size(config: &impl ConfigRead, id: u16, offset: u16) -> u16 {
    match id {
        // An endpoint's, to the header log. What may follow is a root port's, or a log. §7.8.4
        spec::EXT_CAP_AER => 0x2c,
        policy::EXT_CAP_POWER_BUDGETING => 0x10,
        spec::EXT_CAP_LTR => 8,
        // It says so itself. §7.9.5.2, §7.9.6.2
        spec::EXT_CAP_VENDOR | policy::EXT_CAP_DESIGNATED_VENDOR => {
            (config.read_dword(offset.saturating_add(4)) >> 20) as u16
        }
        // The header. VFIO has no writes for it.
        _ => 4,
    }
}

/// Bytes of a capability of the header's list that are surely its own.
fn known_length(config: &impl ConfigRead, kept: &Kept) -> u16 {
    const MSI: u16 = spec::CAP_MSI as u16;
    const MSIX: u16 = spec::CAP_MSIX as u16;
    const VENDOR: u16 = spec::CAP_VENDOR as u16;
    let start = kept.extent.start;
    let [_, _, length, _] = config.read_dword(start).to_le_bytes();
    match kept.id {
        MSI => MsiFeatures::from_control((config.read_dword(start) >> 16) as u16).capability_size(),
        MSIX => spec::MSIX_CAPABILITY_SIZE,
        VENDOR => u16::from(length).max(4),
        id => match standard_size(config, id, start) {
            spec::EXTENDED_CONFIG_START => 8,
            size => size,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space(dwords: &[(u16, u32)]) -> impl Fn(u16) -> u32 + use<> {
        let dwords = dwords.to_vec();
        move |offset| {
            let found = dwords.iter().find(|(at, _)| *at == offset);
            found.map_or(0, |(_, value)| *value)
        }
    }

    /// What a host shows that does not show the device's own lists.
    fn nothing(_: u16) -> u32 {
        0
    }

    fn ids(list: &List) -> Vec<u16> {
        list.kept.iter().map(|kept| kept.id).collect()
    }

    #[test]
    fn what_the_table_hides_leaves_the_chain_and_the_rest_keeps_its_order() {
        // AER at 0x100, SR-IOV at 0x160, serial number at 0x140, in this order.
        let config = space(&[
            (0x100, 0x1602_0001),
            (0x160, 0x1401_0010),
            (0x140, 0x0001_0003),
        ]);
        let list = extended(&config, &nothing);
        assert_eq!(ids(&list), [spec::EXT_CAP_AER, spec::EXT_CAP_SERIAL_NUMBER]);
        assert_eq!(
            list.hidden,
            [Extent {
                start: 0x160,
                end: 0x1a0
            }]
        );
        let links: Vec<_> = list
            .links()
            .map(|(kept, next)| (kept.extent.start, next))
            .collect();
        assert_eq!(links, [(0x100, 0x140), (0x140, 0)]);
    }

    #[test]
    fn a_loop_ends_and_overlapping_capabilities_are_cut() {
        let header = (0x04, u32::from(spec::STATUS_CAPABILITIES) << 16);
        let config = space(&[header, (0x34, 0x40), (0x40, 0x4410), (0x44, 0x4005)]);
        let list = standard(&config, &nothing);
        assert_eq!(ids(&list), [0x10, 0x05]);
        let spans: Vec<_> = list
            .kept
            .iter()
            .map(|k| (k.extent.start, k.extent.end))
            .collect();
        assert_eq!(spans, [(0x40, 0x44), (0x44, 0x100)]);
    }

    #[test]
    fn all_ones_is_no_list() {
        let gone = |_| u32::MAX;
        assert!(standard(&gone, &gone).kept.is_empty());
        assert!(extended(&gone, &gone).kept.is_empty());
    }

    #[test]
    fn what_vfio_unlinked_is_hidden_by_the_same_table_and_bounds_what_stays() {
        // Secondary PCIe at 0x100, a capability of the vendor's that says 0x80 bytes, L1 substates in
        // the midst of it, an unknown capability.
        let own = space(&[
            (0x100, 0x1201_0019),
            (0x120, 0x1401_000b),
            (0x124, 0x0800_0001),
            (0x140, 0x2001_001e),
            (0x200, 0x0001_7fff),
        ]);
        let vfio = space(&[
            (0x100, 0x1200_0000),
            (0x120, 0x0001_000b),
            (0x124, 0x0800_0001),
        ]);
        let span = |extent: &Extent| (extent.start, extent.end);
        let list = extended(&vfio, &own);
        assert_eq!(ids(&list), [spec::EXT_CAP_VENDOR]);
        assert_eq!(span(&list.kept[0].extent), (0x120, 0x140));
        let hidden: Vec<_> = list.hidden.iter().map(span).collect();
        assert_eq!(hidden, [(0x100, 0x10e), (0x140, 0x154)]);
        let list = extended(&vfio, &nothing);
        assert_eq!(span(&list.kept[0].extent), (0x120, 0x1a0));
        let hidden: Vec<_> = list.hidden.iter().map(span).collect();
        assert_eq!(hidden, [(0x100, 0x104)]);
    }

    proptest! {
        #[test]
        fn extents_never_overlap_whatever_the_device_says(
            words in prop::collection::vec(any::<u32>(), 1024),
            links in prop::collection::vec((any::<u16>(), 0_u16..0x40), 0..64),
        ) {
            let mut words = words;
            for (at, id) in links {
                // A chain that holds together somewhat more often than chance.
                let next = u32::from(at) % 0xf00 + 0x100;
                let from = usize::from(at / 7 % 960 + 64);
                words[from] = (next & 0xffc) << 20 | u32::from(id) | 1 << 16;
            }
            words[1] |= u32::from(spec::STATUS_CAPABILITIES) << 16;
            let read = |words: &[u32], offset: u16| {
                words.get(usize::from(offset / 4)).copied().unwrap_or(0)
            };
            // VFIO's view and the device's have little in common.
            let other: Vec<_> = words.iter().rev().copied().collect();
            let config = |offset| read(&words, offset);
            let own = |offset| match offset {
                0x04 | 0x34 | 0x100 => read(&words, offset),
                _ => read(&other, offset),
            };
            for list in [standard(&config, &own), extended(&config, &own)] {
                let mut all: Vec<_> = list.kept.iter().map(|k| k.extent).chain(list.hidden).collect();
                all.sort_by_key(|extent| extent.start);
                prop_assert!(all.iter().all(|extent| extent.start < extent.end));
                prop_assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
            }
        }
    }
}
