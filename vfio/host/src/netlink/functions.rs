//! What a physical function's network interface is told, and tells, of its virtual functions.

use std::collections::BTreeMap;
use std::fmt;
use std::io;

use crate::mac::Mac;

use super::{
    HEADER, NLM_F_ACK, acknowledged, ask, attribute, attributes, malformed, request, u16_at, u32_at,
};

/// What a virtual function can be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfSetting {
    /// Its Ethernet address.
    Mac(Mac),
    /// The VLAN that it is in, 1 to 4094; 0: none.
    Vlan(u16),
    /// Whether it may do what concerns others: be promiscuous, change its own address.
    Trust(bool),
    /// Whether frames with another's source address are dropped.
    SpoofCheck(bool),
}

/// What a virtual function is set to, as far as the driver says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VfState {
    /// Its Ethernet address; none while the driver leaves that to whoever gets it.
    pub mac: Option<Mac>,
    /// The VLAN that it is in; none: all frames are its own.
    pub vlan: Option<u16>,
    /// See [`VfSetting::Trust`].
    pub trust: Option<bool>,
    /// See [`VfSetting::SpoofCheck`].
    pub spoof_check: Option<bool>,
}

/// As `ip link set … vf N` spells it.
impl fmt::Display for VfSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let switch = |on: &bool| if *on { "on" } else { "off" };
        match self {
            Self::Mac(mac) => write!(f, "mac {mac}"),
            Self::Vlan(id) => write!(f, "vlan {id}"),
            Self::Trust(on) => write!(f, "trust {}", switch(on)),
            Self::SpoofCheck(on) => write!(f, "spoofchk {}", switch(on)),
        }
    }
}

// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
/// The length of `struct ifinfomsg`.
const LINK: usize = 16;
const RTEXT_FILTER_VF: u32 = 1;
const RTEXT_FILTER_SKIP_STATS: u32 = 8;
// linux/if_link.h
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const IFLA_VF_VLAN: u16 = 2;
const IFLA_VF_SPOOFCHK: u16 = 4;
const IFLA_VF_TRUST: u16 = 9;

/// Sets one virtual function of the interface with this index.
pub(crate) fn set(interface: u32, vf: u32, setting: VfSetting) -> io::Result<()> {
    let answer = ask(&set_request(interface, vf, setting))?;
    acknowledged(&answer)
}

/// What the virtual functions of the interface with this index are set to.
pub(crate) fn states(interface: u32) -> io::Result<BTreeMap<u32, VfState>> {
    parse_states(&ask(&states_request(interface))?)
}

fn set_request(interface: u32, vf: u32, setting: VfSetting) -> Vec<u8> {
    let mut value = vf.to_ne_bytes().to_vec();
    let kind = match setting {
        VfSetting::Mac(Mac(bytes)) => {
            // struct ifla_vf_mac has room for 32 bytes of it.
            value.extend(bytes);
            value.resize(4 + 32, 0);
            IFLA_VF_MAC
        }
        VfSetting::Vlan(id) => {
            value.extend(u32::from(id).to_ne_bytes());
            // No priority.
            value.extend(0u32.to_ne_bytes());
            IFLA_VF_VLAN
        }
        VfSetting::Trust(on) => {
            value.extend(u32::from(on).to_ne_bytes());
            IFLA_VF_TRUST
        }
        VfSetting::SpoofCheck(on) => {
            value.extend(u32::from(on).to_ne_bytes());
            IFLA_VF_SPOOFCHK
        }
    };
    let info = attribute(IFLA_VF_INFO, &attribute(kind, &value));
    let list = attribute(IFLA_VFINFO_LIST, &info);
    message(RTM_SETLINK, NLM_F_ACK, interface, &list)
}

fn states_request(interface: u32) -> Vec<u8> {
    let mask = RTEXT_FILTER_VF | RTEXT_FILTER_SKIP_STATS;
    let mask = attribute(IFLA_EXT_MASK, &mask.to_ne_bytes());
    message(RTM_GETLINK, 0, interface, &mask)
}

/// A request about an interface.
fn message(kind: u16, flags: u16, interface: u32, attributes: &[u8]) -> Vec<u8> {
    // struct ifinfomsg: family and type, index, flags and which of them to change.
    let mut link = [0; LINK];
    link[4..8].copy_from_slice(&interface.to_ne_bytes());
    request(kind, flags, &link, attributes)
}

fn parse_states(answer: &[u8]) -> io::Result<BTreeMap<u32, VfState>> {
    acknowledged(answer)?;
    let length = u32_at(answer, 0).ok_or_else(malformed)? as usize;
    let link = answer.get(HEADER + LINK..length).ok_or_else(malformed)?;
    if u16_at(answer, 4) != Some(RTM_NEWLINK) {
        return Err(malformed());
    }
    let mut states = BTreeMap::new();
    let lists = attributes(link).filter(|(kind, _)| *kind == IFLA_VFINFO_LIST);
    for (_, info) in lists.flat_map(|(_, list)| attributes(list)) {
        let mut state = VfState::default();
        let mut index = None;
        for (kind, value) in attributes(info) {
            // Each begins with the function's number.
            let Some(setting) = u32_at(value, 4) else {
                continue;
            };
            // A driver that cannot say has all bits set.
            let switch = (setting != u32::MAX).then_some(setting != 0);
            match kind {
                IFLA_VF_MAC => {
                    index = u32_at(value, 0);
                    let mac = value
                        .get(4..10)
                        .and_then(|mac| mac.try_into().ok())
                        .map(Mac);
                    state.mac = mac.filter(|mac| mac.0 != [0; 6]);
                }
                IFLA_VF_VLAN => {
                    state.vlan = u16::try_from(setting).ok().filter(|&id| id != 0);
                }
                IFLA_VF_SPOOFCHK => state.spoof_check = switch,
                IFLA_VF_TRUST => state.trust = switch,
                _ => {}
            }
        }
        states.extend(index.map(|index| (index, state)));
    }
    Ok(states)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

    #[test]
    #[cfg(target_endian = "little")]
    fn a_request_is_laid_out_as_the_headers_say() {
        let header = [0x38, 0, 0, 0, 19, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let link = [0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let nested = [24, 0, 22, 0, 20, 0, 1, 0, 16, 0, 2, 0];
        let vlan = [3, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0];
        let expected = [&header[..], &link, &nested, &vlan].concat();
        assert_eq!(set_request(5, 3, VfSetting::Vlan(100)), expected);
    }

    /// What the kernel answers of these functions.
    fn answer(functions: &[(u32, VfState)]) -> Vec<u8> {
        let switch = |index: u32, on: Option<bool>| {
            let value = on.map_or(u32::MAX, u32::from);
            [index.to_ne_bytes(), value.to_ne_bytes()].concat()
        };
        let mut list = Vec::new();
        for &(index, state) in functions {
            let mut mac = index.to_ne_bytes().to_vec();
            mac.extend(state.mac.map_or([0; 6], |mac| mac.0));
            mac.resize(36, 0);
            let vlan = u32::from(state.vlan.unwrap_or(0));
            let vlan = [index.to_ne_bytes(), vlan.to_ne_bytes(), [0; 4]].concat();
            let mut info = attribute(IFLA_VF_MAC, &mac);
            info.extend(attribute(IFLA_VF_VLAN, &vlan));
            info.extend(attribute(
                IFLA_VF_SPOOFCHK,
                &switch(index, state.spoof_check),
            ));
            info.extend(attribute(IFLA_VF_TRUST, &switch(index, state.trust)));
            list.extend(attribute(IFLA_VF_INFO | 0x8000, &info));
        }
        // IFLA_IFNAME before it, as ever.
        let mut attributes = attribute(3, b"eth0\0");
        attributes.extend(attribute(IFLA_VFINFO_LIST | 0x8000, &list));
        message(RTM_NEWLINK, 0, 2, &attributes)
    }

    #[test]
    fn what_the_kernel_says_of_each_function_is_read() {
        let functions = [
            (
                0,
                VfState {
                    mac: Some(MAC),
                    vlan: Some(7),
                    trust: Some(true),
                    spoof_check: Some(false),
                },
            ),
            (1, VfState::default()),
        ];
        let states = parse_states(&answer(&functions)).unwrap();
        assert_eq!(states, BTreeMap::from(functions));
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_fail(mut noise in prop::collection::vec(any::<u8>(), 0..200), cut in 0..400usize) {
            let _ = parse_states(&noise);
            let functions = [(0, VfState { mac: Some(MAC), ..VfState::default() }), (1, VfState::default())];
            let mut bytes = answer(&functions);
            bytes.truncate(cut);
            bytes.append(&mut noise);
            let _ = parse_states(&bytes);
        }
    }
}
