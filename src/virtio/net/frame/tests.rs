use super::*;
use proptest::prelude::*;

const OURS: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
const FROM_HOST: u64 =
    net::F_GUEST_CSUM | net::F_GUEST_TSO4 | net::F_GUEST_TSO6 | net::F_GUEST_ECN | GUEST_USO;
const FROM_GUEST: u64 =
    net::F_CSUM | net::F_HOST_TSO4 | net::F_HOST_TSO6 | net::F_HOST_ECN | net::F_HOST_USO;

/// `struct virtio_net_hdr`
#[derive(Clone, Copy, Debug, Default)]
struct Header {
    flags: u8,
    gso: u8,
    size: u16,
    start: u16,
    offset: u16,
}

const USO: Header = Header {
    flags: net::HDR_F_NEEDS_CSUM,
    gso: net::GSO_UDP_L4,
    size: 1400,
    start: 34,
    offset: UDP_CHECKSUM,
};

/// A frame's beginning, of the type `kind`.
fn head(header: Header, from: Mac, kind: [u8; 2]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[0..2].copy_from_slice(&[header.flags, header.gso]);
    for (at, field) in [(4, header.size), (6, header.start), (8, header.offset)] {
        head[at..at + 2].copy_from_slice(&field.to_le_bytes());
    }
    head[net::HEADER_SIZE + 6..net::HEADER_SIZE + 12].copy_from_slice(&from.0);
    head[net::HEADER_SIZE + 12..].copy_from_slice(&kind);
    head
}

const IP: [u8; 2] = [8, 0];

fn check(header: Header, length: usize, unfinished: Unfinished) -> Result<(), Refused> {
    let head = head(header, OURS, IP);
    Rules::default().check(&head, net::HEADER_SIZE + length, unfinished)
}

#[test]
fn segments_of_udp_pass_where_they_were_agreed_on_and_their_header_is_right() {
    let all = Unfinished::to_host(FROM_GUEST);
    assert_eq!(check(USO, 9000, all), Ok(()));
    let without = Unfinished::to_host(FROM_GUEST & !net::F_HOST_USO);
    assert_eq!(check(USO, 9000, without), Err(Refused::Header));
    for wrong in [
        Header { flags: 0, ..USO },
        Header { size: 0, ..USO },
        Header { offset: 16, ..USO },
        Header {
            gso: net::GSO_UDP_L4 | net::GSO_ECN,
            ..USO
        },
        Header { start: 8993, ..USO },
        Header {
            start: u16::MAX,
            ..USO
        },
    ] {
        assert_eq!(check(wrong, 9000, all), Err(Refused::Header), "{wrong:?}");
    }
    // A tap hands them over for both versions of IP, or for none.
    assert_eq!(check(USO, 9000, Unfinished::to_guest(FROM_HOST)), Ok(()));
    for one in [net::F_GUEST_USO4, net::F_GUEST_USO6] {
        let one = Unfinished::to_guest(FROM_HOST & !one);
        assert_eq!(check(USO, 9000, one), Err(Refused::Header));
    }
}

#[test]
fn what_was_not_agreed_on_does_not_pass_and_what_was_does() {
    let tcp = |gso| Header {
        gso,
        offset: 16,
        ..USO
    };
    for (header, guest, host) in [
        (tcp(net::GSO_TCPV4), net::F_HOST_TSO4, net::F_GUEST_TSO4),
        (tcp(net::GSO_TCPV6), net::F_HOST_TSO6, net::F_GUEST_TSO6),
        (
            tcp(net::GSO_TCPV4 | net::GSO_ECN),
            net::F_HOST_ECN,
            net::F_GUEST_ECN,
        ),
        (
            Header {
                flags: net::HDR_F_NEEDS_CSUM,
                ..Header::default()
            },
            net::F_CSUM,
            net::F_GUEST_CSUM,
        ),
    ] {
        for (all, lacks) in [
            (
                Unfinished::to_host(FROM_GUEST),
                Unfinished::to_host(FROM_GUEST & !guest),
            ),
            (
                Unfinished::to_guest(FROM_HOST),
                Unfinished::to_guest(FROM_HOST & !host),
            ),
        ] {
            assert_eq!(check(header, 3000, all), Ok(()), "{header:?}");
            assert_eq!(
                check(header, 3000, lacks),
                Err(Refused::Header),
                "{header:?}"
            );
        }
    }
    // Fragments of UDP are never offered (VIRTIO_NET_HDR_GSO_UDP), and ECN says nothing by itself.
    for gso in [2, 3, 6, 127, net::GSO_ECN] {
        let all = Unfinished::to_host(u64::MAX);
        assert_eq!(check(tcp(gso), 3000, all), Err(Refused::Header), "{gso}");
    }
    assert_eq!(check(Header::default(), 60, Unfinished::default()), Ok(()));
}

#[test]
fn a_frame_is_as_long_as_the_mtu_and_its_header_with_a_tag_or_without() {
    let rules = Rules {
        mtu: Some(1400),
        source: None,
    };
    let passes = |header: Header, kind, length: usize| {
        let all = Unfinished::to_host(FROM_GUEST);
        rules.check(&head(header, OURS, kind), net::HEADER_SIZE + length, all)
    };
    let whole = Header::default();
    assert_eq!(passes(whole, IP, 1414), Ok(()));
    assert_eq!(passes(whole, IP, 1415), Err(Refused::Long));
    for tag in TAG_TYPES {
        assert_eq!(passes(whole, tag, 1418), Ok(()));
        assert_eq!(passes(whole, tag, 1419), Err(Refused::Long));
    }
    assert_eq!(passes(USO, IP, 60_000), Ok(()), "it is cut later");
    for length in 0..ETHERNET {
        assert_eq!(passes(whole, IP, length), Err(Refused::Short));
    }
}

#[test]
fn a_frame_from_another_address_does_not_pass_where_that_is_looked_at() {
    let other = Mac([0x52, 0x54, 0, 1, 2, 4]);
    let check = |source, from| {
        let rules = Rules { mtu: None, source };
        let head = head(Header::default(), from, IP);
        rules.check(&head, HEAD, Unfinished::default())
    };
    assert_eq!(check(Some(OURS), OURS), Ok(()));
    assert_eq!(check(Some(OURS), other), Err(Refused::Source));
    assert_eq!(check(None, other), Ok(()));
}

proptest! {
    /// Whatever a guest writes into the header, what passes is what was agreed on.
    #[test]
    fn whatever_a_header_says_what_passes_was_agreed_on(
        bytes in any::<[u8; HEAD]>(), length in 0_usize..70_000, features in any::<u64>(), mtu in prop::option::of(68_u16..),
    ) {
        let unfinished = Unfinished::to_host(features);
        let rules = Rules { mtu, source: None };
        let Ok(()) = rules.check(&bytes, length, unfinished) else { return Ok(()) };
        let frame = length - net::HEADER_SIZE;
        let has = |feature: u64| features & feature != 0;
        if bytes[0] & net::HDR_F_NEEDS_CSUM != 0 {
            prop_assert!(has(net::F_CSUM));
            let start = u16::from_le_bytes([bytes[6], bytes[7]]);
            let offset = u16::from_le_bytes([bytes[8], bytes[9]]);
            prop_assert!(usize::from(start) + usize::from(offset) + 2 <= frame);
        }
        match bytes[1] {
            0 => prop_assert!(mtu.is_none_or(|mtu| frame <= usize::from(mtu) + ETHERNET + TAG)),
            1 => prop_assert!(has(net::F_HOST_TSO4)),
            4 => prop_assert!(has(net::F_HOST_TSO6)),
            5 => prop_assert!(has(net::F_HOST_USO) && bytes[0] & 1 != 0),
            0x81 => prop_assert!(has(net::F_HOST_TSO4) && has(net::F_HOST_ECN)),
            0x84 => prop_assert!(has(net::F_HOST_TSO6) && has(net::F_HOST_ECN)),
            other => prop_assert!(false, "{other:#x}"),
        }
    }
}
