//! The words of `--vsock`.

use super::{Key, Section};
use crate::config::VsockConfig;

/// `--vsock`
pub(in crate::cli) static VSOCK: Section<VsockConfig> = Section {
    name: "vsock",
    summary: "Sockets between host and guest (vsock): cid=N[,socket=PATH]…",
    words: &[],
    notes: "\
Programs in the guest connect to 2 by AF_VSOCK. Without socket= the host's kernel
serves them (vhost_vsock), and programs on the host connect to N by AF_VSOCK.
With it they connect to PATH, write `CONNECT port` and a newline, and read
`OK port`; what the guest connects to at a port listens at PATH_port.",
    blank: || VsockConfig {
        cid: 0,
        socket: None,
        id: None,
        pci_segment: 0,
        pci_device_id: None,
    },
    keys: keys! {
        "cid" { "N": "the guest's address, 3 or more; no other VM's of the host without socket=" }
            |vsock, value| vsock.cid = value.number()?;
        "socket" { "PATH": "a Unix socket for programs on the host, in place of AF_VSOCK" }
            |vsock, value| vsock.socket = Some(value.text()?.into());
        "id" { "NAME": "name, unique in the VM" }
            |vsock, value| vsock.id = Some(value.text()?.to_owned());
        "pci_segment" { "N": "the PCI segment that it is in [0]" }
            |vsock, value| vsock.pci_segment = value.number()?;
        "pci_device_id" { "N": "its device number on bus 0 there, 1 to 15 [any that is free]" }
            |vsock, value| vsock.pci_device_id = Some(value.number()?);
    },
    required: &["cid"],
    bare: None,
    single: false,
    details: &[],
};
