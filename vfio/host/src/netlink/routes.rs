//! The kernel's routes in all of its tables, of which procfs shows the main one only for IPv4.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use super::{HEADER, NLM_F_DUMP, ask, ask_for_all, attribute, attributes, request, u16_at, u32_at};

// linux/rtnetlink.h
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
/// The length of `struct rtmsg`.
const ROUTE: usize = 12;
/// Not one that refuses, nor the host's own address.
const RTN_UNICAST: u8 = 1;
/// A route that was looked up, and is none of a table's.
const RTM_F_CLONED: u32 = 0x200;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_MULTIPATH: u16 = 9;

/// The interfaces, by index, that a default route of any table leaves by.
pub(crate) fn default_routes() -> io::Result<BTreeSet<u32>> {
    let mut found = BTreeSet::new();
    ask_for_all(
        &request(RTM_GETROUTE, NLM_F_DUMP, &[0; ROUTE], &[]),
        |message| {
            found.extend(default_route(message).into_iter().flatten());
        },
    )?;
    Ok(found)
}

/// The interface, by index, that packets to an address leave by, where they come from this address of
/// the host's: as the kernel's rules have it.
pub(crate) fn way_to(there: IpAddr, here: Option<IpAddr>) -> io::Result<Option<u32>> {
    let answer = ask(&way_request(there, here))?;
    super::acknowledged(&answer)?;
    Ok(route(&answer).and_then(|(_, attributes)| interfaces(attributes).into_iter().next()))
}

fn way_request(there: IpAddr, here: Option<IpAddr>) -> Vec<u8> {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let family = |address: IpAddr| match address {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    };
    let here = here.filter(|here| family(*here) == family(there));
    let mut attributes = attribute(RTA_DST, &bytes(there));
    attributes.extend(here.map_or_else(Vec::new, |here| attribute(RTA_SRC, &bytes(here))));
    let bits = |address: IpAddr| (bytes(address).len() * 8) as u8;
    // struct rtmsg: family, and how long both prefixes are.
    let mut head = [0; ROUTE];
    head[..3].copy_from_slice(&[family(there), bits(there), here.map_or(0, bits)]);
    request(RTM_GETROUTE, 0, &head, &attributes)
}

/// What a message about a route begins with, and its attributes.
fn route(message: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32_at(message, 0)? as usize;
    let body = message.get(HEADER..length)?;
    (u16_at(message, 4)? == RTM_NEWROUTE).then(|| body.split_at_checked(ROUTE))?
}

/// Where a default route leaves, if the message is about one.
fn default_route(message: &[u8]) -> Option<Vec<u32>> {
    let (head, attributes) = route(message)?;
    let &[_, to, from, _, _, _, _, kind, ..] = head else {
        return None;
    };
    let cloned = u32_at(head, 8)? & RTM_F_CLONED != 0;
    (to == 0 && from == 0 && kind == RTN_UNICAST && !cloned).then(|| interfaces(attributes))
}

fn interfaces(bytes: &[u8]) -> Vec<u32> {
    let mut found = Vec::new();
    for (kind, value) in attributes(bytes) {
        match kind {
            RTA_OIF => found.extend(u32_at(value, 0)),
            RTA_MULTIPATH => {
                // struct rtnexthop: length, two bytes of others', the interface.
                let mut hops = value;
                while let (Some(length @ 8..), Some(interface)) = (u16_at(hops, 0), u32_at(hops, 4))
                {
                    found.push(interface);
                    let length = usize::from(length).next_multiple_of(4);
                    hops = hops.get(length..).unwrap_or_default();
                }
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(to: u8, table: u8, kind: u8, attributes: &[u8]) -> Vec<u8> {
        let head = [2, to, 0, 0, table, 3, 0, kind, 0, 0, 0, 0];
        request(RTM_NEWROUTE, 0, &head, attributes)
    }

    fn by(interface: u32) -> Vec<u8> {
        attribute(RTA_OIF, &interface.to_ne_bytes())
    }

    #[test]
    fn a_default_route_of_any_table_counts_and_no_other_route() {
        assert_eq!(
            default_route(&answer(0, 254, RTN_UNICAST, &by(2))),
            Some(vec![2])
        );
        assert_eq!(
            default_route(&answer(0, 100, RTN_UNICAST, &by(3))),
            Some(vec![3])
        );
        assert_eq!(default_route(&answer(24, 100, RTN_UNICAST, &by(3))), None);
        const UNREACHABLE: u8 = 7;
        assert_eq!(default_route(&answer(0, 254, UNREACHABLE, &by(1))), None);
    }

    #[test]
    fn every_hop_of_a_route_of_several_counts() {
        let hop = |interface: u32| {
            let gateway = attribute(5, &[10, 0, 0, 1]);
            let length = (8 + gateway.len()) as u16;
            [
                &length.to_ne_bytes()[..],
                &[0, 0],
                &interface.to_ne_bytes(),
                &gateway,
            ]
            .concat()
        };
        let hops = attribute(RTA_MULTIPATH, &[hop(4), hop(5)].concat());
        assert_eq!(
            default_route(&answer(0, 254, RTN_UNICAST, &hops)),
            Some(vec![4, 5])
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_way_is_asked_for_as_the_headers_say() {
        let there = "192.0.2.1".parse().unwrap();
        let header = [44, 0, 0, 0, 26, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let head = [2, 32, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let to = [8, 0, 1, 0, 192, 0, 2, 1];
        let from = [8, 0, 2, 0, 10, 0, 0, 2];
        let expected = [&header[..], &head, &to, &from].concat();
        assert_eq!(
            way_request(there, Some("10.0.0.2".parse().unwrap())),
            expected
        );
        // Of another family it says nothing.
        let other = way_request(there, Some("::1".parse().unwrap()));
        assert_eq!(other, way_request(there, None));
    }

    #[test]
    fn this_kernel_says_how_it_reaches_itself() {
        let way = way_to("127.0.0.1".parse().unwrap(), None);
        // A sandbox may keep the socket from us, and nothing more.
        if let Err(error) = &way {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        }
        let _ = default_routes();
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_fail(noise in prop::collection::vec(any::<u8>(), 0..80), cut in 0..120usize) {
            let mut bytes = answer(0, 254, RTN_UNICAST, &attribute(RTA_MULTIPATH, &noise));
            bytes.truncate(cut);
            bytes.extend(&noise);
            let _ = default_route(&bytes);
            let _ = default_route(&noise);
            let _ = interfaces(&noise);
        }
    }
}
