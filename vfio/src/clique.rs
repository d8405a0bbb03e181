//! NVIDIA's capability that tells a guest's driver which GPUs can reach each other directly.
//!
//! The driver of a GPU in a guest sees another topology than the host's, and leaves direct copies
//! between GPUs alone unless this capability puts both into one clique. Whoever gives the GPUs away
//! answers for it that they can. "GPUDirect P2P virtualization" of NVIDIA, in its revisions up to
//! Pascal and from Turing on: <https://lists.gnu.org/archive/html/qemu-devel/2023-06/pdf142OR4O4c2.pdf>
//!
//! ```text
//! byte 0  capability: vendor-specific (0x09)
//! byte 1  next: none, for it stands at the end of the list
//! byte 2  length: 8
//! byte 3  signature: "P2P"
//! byte 6  bits 2:0 version (0), bits 6:3 the clique
//! byte 7  reserved
//! ```

use busway_pci::spec;

use crate::DeviceIo;
use crate::SurveyError;
use crate::access::read_dword;
use crate::config::GuestConfig;
use crate::lists::{Extent, Kept, List};

const VENDOR: u16 = 0x10de;
/// Base class: display controller. PCI Code and ID Assignment 1.15 §1.4
const DISPLAY: u8 = 0x03;
const SIZE: u16 = 8;
/// Where it may be: the second from Turing on, which have MSI-X at the first.
const PLACES: [u16; 2] = [0xc8, 0xd4];

/// The capability for one GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Clique {
    at: u16,
    number: u8,
}

impl Clique {
    /// Finds its place and appends it to the list.
    pub(crate) fn add(
        name: &str,
        io: &dyn DeviceIo,
        number: u8,
        list: &mut List,
    ) -> Result<Self, SurveyError> {
        let refuse = |why| SurveyError::Clique {
            name: name.to_owned(),
            why,
        };
        let [_, _, _, class] = read_dword(io, spec::REVISION_ID).to_le_bytes();
        if read_dword(io, spec::VENDOR_ID) as u16 != VENDOR || class != DISPLAY {
            return Err(refuse("it is no NVIDIA GPU"));
        }
        if number > 15 {
            return Err(refuse("cliques count from 0 to 15"));
        }
        let dword = |offset| read_dword(io, offset);
        let at = PLACES
            .into_iter()
            .find(|&at| list.is_free(&dword, at, SIZE))
            .ok_or_else(|| refuse("its configuration space has no room at 0xc8 or 0xd4"))?;
        list.append(Kept {
            id: spec::CAP_VENDOR.into(),
            version: 0,
            extent: Extent {
                start: at,
                end: at + SIZE,
            },
            rules: &[],
            read_only: true,
        });
        Ok(Self { at, number })
    }

    /// Writes it into the guest's configuration space.
    pub(crate) fn show(self, config: &mut GuestConfig) {
        config.hide(self.at.saturating_add(2), self.at.saturating_add(SIZE));
        let body = [SIZE as u8, b'P', b'2', b'P', self.number << 3, 0];
        for (at, byte) in (self.at.saturating_add(2)..).zip(body) {
            config.define(at, byte, 0);
        }
    }
}
