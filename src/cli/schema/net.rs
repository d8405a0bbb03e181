//! The words of `--net`.

use super::{Key, Section};
use crate::cli::value::{Reason, Value};
use crate::config::{NetConfig, VhostMode};

/// `--net`
pub(in crate::cli) static NET: Section<NetConfig> = Section {
    name: "net",
    summary: "Virtio NIC on a tap, or another process's: tap=NAME|vhost_user=on,socket=PATH[,mac=MAC]…",
    words: &[],
    notes: "",
    blank: NetConfig::default,
    keys: keys! {
        "tap" { "NAME": "the interface, made where there is none [named by the kernel]" }
            |net, value| net.tap = Some(value.text()?.to_owned());
        "fd" { "N|[N,…]": "in place of tap=: descriptors of a tap that Busway inherits, one for\n\
                 each pair of queues, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR" }
            |net, value| net.fd = numbers(value)?;
        "vhost_user" { "on|off": "another process serves the NIC, and there is no tap [off]" }
            |net, value| net.vhost_user = value.switch()?;
        "socket" { "PATH": "with vhost_user=on: the Unix socket where it is met" }
            |net, value| net.socket = Some(value.text()?.into());
        "vhost_mode" { "client": "that process listens [client]", "server": "Busway listens" }
            |net, value| net.vhost_mode = vhost_mode(value)?;
        "mac" { "MAC": "the guest's address [random]" }
            |net, value| net.mac = Some(value.mac()?);
        "mtu" { "N": "the longest packet without its Ethernet header, 68 to 65535: of the\n\
                 guest's, and of the tap, which is set to it [1500, as the tap is]" }
            |net, value| net.mtu = Some(value.number()?);
        "spoofchk" { "on|off": "what the guest sends from another address than mac= is dropped; the\n\
                      host's kernel does not serve such a NIC [off]" }
            |net, value| net.spoofchk = value.switch()?;
        "num_queues" { "N": "receive and transmit queues together, even [2]" }
            |net, value| net.num_queues = value.number()?;
        "queue_size" { "N": "descriptors of a queue, a power of two from 32 to 4096 [256]" }
            |net, value| net.queue_size = value.number()?;
        "vhost" { "on|off": "packets pass in the host's kernel, and not by Busway [on where\n\
                 /dev/vhost-net can be opened]" }
            |net, value| net.vhost = value.choice()?;
        "id" { "NAME": "name, unique in the VM" }
            |net, value| net.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |net, value| net.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |net, value| net.pci_device_id = Some(value.number()?);
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// Which end of the socket Busway can be.
const MODES: &[&str] = &["client", "server"];

fn vhost_mode(value: &Value) -> Result<VhostMode, Reason> {
    match value {
        Value::Text(word) if word.eq_ignore_ascii_case("client") => Ok(VhostMode::Client),
        Value::Text(word) if word.eq_ignore_ascii_case("server") => Ok(VhostMode::Server),
        other => Err(Reason::Word {
            value: other.to_string(),
            words: MODES,
        }),
    }
}

/// A number, or a list of them.
fn numbers(value: &Value) -> Result<Vec<u32>, Reason> {
    match value {
        Value::List(values) => values.iter().map(Value::number).collect(),
        value => Ok(vec![value.number()?]),
    }
}
