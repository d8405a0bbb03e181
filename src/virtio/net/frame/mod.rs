//! What a frame may be: the header that virtio has before it, its length, and whose address it is from.
//!
//! Both ends are held to it. A guest writes what it likes into its header, and a tap may have frames waiting from before
//! its driver took back what it takes unfinished. Virtio 1.3 §5.1.6.

use busway_host::Mac;

use super::features::GUEST_USO;
use crate::virtio::spec::net;

/// Bytes of an Ethernet header: two addresses and a type. IEEE 802.3 §3.1.1
const ETHERNET: usize = 14;
/// Bytes of a tag of a virtual LAN, in the place of the type. IEEE 802.1Q §9.6
const TAG: usize = 4;
/// The types that stand for such a tag: of customers and of services.
const TAG_TYPES: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// Where the checksum is in UDP's header. RFC 768
const UDP_CHECKSUM: u16 = 6;

/// The bytes of a frame that are looked at: virtio's header, and Ethernet's.
pub(super) const HEAD: usize = net::HEADER_SIZE + ETHERNET;

/// Why a frame goes no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is shorter than its headers.
    Short,
    /// Virtio's header asks for what was not agreed on, or contradicts itself.
    Header,
    /// It is longer than the MTU lets it be.
    Long,
    /// It is from another address than the card's.
    Source,
}

/// What one side may leave unfinished to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Unfinished {
    checksums: bool,
    tcp4: bool,
    tcp6: bool,
    ecn: bool,
    udp: bool,
}

impl Unfinished {
    /// What a driver that agreed on `features` may send.
    pub(super) fn to_host(features: u64) -> Self {
        let has = |feature| features & feature != 0;
        Self {
            checksums: has(net::F_CSUM),
            tcp4: has(net::F_HOST_TSO4),
            tcp6: has(net::F_HOST_TSO6),
            ecn: has(net::F_HOST_ECN),
            udp: has(net::F_HOST_USO),
        }
    }

    /// What it takes, by the `offloads` that it has chosen.
    pub(super) fn to_guest(offloads: u64) -> Self {
        let has = |feature| offloads & feature == feature;
        Self {
            checksums: has(net::F_GUEST_CSUM),
            tcp4: has(net::F_GUEST_TSO4),
            tcp6: has(net::F_GUEST_TSO6),
            ecn: has(net::F_GUEST_ECN),
            udp: has(GUEST_USO),
        }
    }

    /// Whether checksums may be left open.
    pub(super) fn checksums(self) -> bool {
        self.checksums
    }
}

/// What holds for the frames of a card in one direction.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rules {
    /// The longest packet, without its Ethernet header, where the driver has agreed on one; bytes.
    pub(super) mtu: Option<u16>,
    /// The address that frames have to be from.
    pub(super) source: Option<Mac>,
}

impl Rules {
    /// Whether a frame of `length` bytes, with virtio's header, may pass that begins with `head`.
    ///
    /// # Errors
    /// [`Refused`]
    pub(super) fn check(
        &self,
        head: &[u8; HEAD],
        length: usize,
        unfinished: Unfinished,
    ) -> Result<(), Refused> {
        let length = length.checked_sub(net::HEADER_SIZE);
        let length = length.filter(|length| *length >= ETHERNET);
        let length = length.ok_or(Refused::Short)?;
        let (header, ethernet) = head.split_at(net::HEADER_SIZE);
        let is_whole = check_header(header, length, unfinished).ok_or(Refused::Header)?;
        let tagged = TAG_TYPES.iter().any(|tag| ethernet.ends_with(tag));
        let around = ETHERNET + if tagged { TAG } else { 0 };
        if let Some(mtu) = self.mtu
            && is_whole
            && length > usize::from(mtu).saturating_add(around)
        {
            return Err(Refused::Long);
        }
        match self.source {
            Some(mac) if ethernet.get(6..12) != Some(&mac.0[..]) => Err(Refused::Source),
            _ => Ok(()),
        }
    }
}

/// Whether the frame of `length` bytes behind `header` is whole, and not to be cut into segments; nothing where the header
/// asks for what `unfinished` has not.
fn check_header(header: &[u8], length: usize, unfinished: Unfinished) -> Option<bool> {
    // `struct virtio_net_hdr`: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
    let [flags, gso, rest @ ..] = header else {
        return None;
    };
    let field = |at: usize| -> Option<u16> {
        let bytes = rest.get(at..)?.first_chunk()?;
        Some(u16::from_le_bytes(*bytes))
    };
    let (size, start, offset) = (field(2)?, field(4)?, field(6)?);
    let open = flags & net::HDR_F_NEEDS_CSUM != 0;
    let end = usize::from(start) + usize::from(offset) + 2;
    if open && (!unfinished.checksums || end > length) {
        return None;
    }
    let (kind, ecn) = (gso & !net::GSO_ECN, gso & net::GSO_ECN != 0);
    let may = match kind {
        net::GSO_NONE => return (!ecn).then_some(true),
        net::GSO_TCPV4 => unfinished.tcp4,
        net::GSO_TCPV6 => unfinished.tcp6,
        net::GSO_UDP_L4 => unfinished.udp && open && offset == UDP_CHECKSUM && !ecn,
        _ => false,
    };
    (may && size > 0 && (!ecn || unfinished.ecn)).then_some(false)
}

#[cfg(test)]
mod tests;
