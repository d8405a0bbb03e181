//! The words of `--vsock`.

use super::{Key, Section};
use crate::config::VsockConfig;

/// `--vsock`
pub(in crate::cli) static VSOCK: Section<VsockConfig> = Section {
    name: "vsock",
    summary: "Sockets between host and guest (vsock): cid=N[,id=NAME]",
    words: &[],
    notes: "\
The host's kernel serves them (vhost_vsock). By AF_VSOCK, programs on the host
connect to N, and those in the guest to 2.",
    blank: || VsockConfig { cid: 0, id: None },
    keys: keys! {
        "cid" { "N": "the guest's address, 3 or more, which no other VM of the host has" }
            |vsock, value| vsock.cid = value.number()?;
        "id" { "NAME": "name, unique in the VM" }
            |vsock, value| vsock.id = Some(value.text()?.to_owned());
    },
    required: &["cid"],
    bare: None,
    single: false,
    details: &[],
};
