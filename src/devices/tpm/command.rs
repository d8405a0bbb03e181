//! The header that each command to a TPM and each response begins with. TPM 2.0 Library, Part 1, §18 and Part 2, §6.6.

use super::crb::BUFFER_SIZE;

/// Bytes of the header: tag, size of the whole, and command or response code, most significant byte first.
pub(super) const HEADER: usize = 10;

/// The TPM has failed, and does nothing more. `TPM_RC_FAILURE`
pub(super) const RC_FAILURE: u32 = 0x101;
/// The size in the header is not the command's. `TPM_RC_COMMAND_SIZE`
pub(super) const RC_COMMAND_SIZE: u32 = 0x142;
/// The TPM could not begin with the command, which is to be sent again. `TPM_RC_RETRY`
pub(super) const RC_RETRY: u32 = 0x922;

/// `TPM_ST_NO_SESSIONS` and `TPM_ST_SESSIONS`, of a command and of its response.
const NO_SESSIONS: u16 = 0x8001;
const SESSIONS: u16 = 0x8002;
/// `TPM_ST_RSP_COMMAND`: what a TPM 1.2 answers with, and a TPM 2.0 to a tag that it does not know.
const RSP_COMMAND: u16 = 0x00c4;

/// `TPM2_GetCapability` of the family (`TPM_PT_FAMILY_INDICATOR`), which asks any TPM 2.0 what it is.
/// Part 3, §30.2
pub(super) const GET_FAMILY: [u8; 22] = [
    0x80, 0x01, 0, 0, 0, 22, 0, 0, 0x01, 0x7a, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 0, 1,
];

/// A response that is a response code alone.
pub(super) const fn response(code: u32) -> [u8; HEADER] {
    let [tag_a, tag_b] = NO_SESSIONS.to_be_bytes();
    let [a, b, c, d] = code.to_be_bytes();
    [tag_a, tag_b, 0, 0, 0, HEADER as u8, a, b, c, d]
}

/// The size that a command's or a response's header says, where one can be so large.
pub(super) fn size(bytes: &[u8]) -> Option<usize> {
    let size = bytes.get(2..6)?.try_into().ok()?;
    let size = usize::try_from(u32::from_be_bytes(size)).ok()?;
    (HEADER..=BUFFER_SIZE).contains(&size).then_some(size)
}

/// What a response's tag says of who has given it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    /// A TPM 2.0.
    Tpm2,
    /// A TPM 1.2, or a TPM 2.0 that knows no such command.
    Old,
    /// No TPM.
    Other,
}

/// The response's tag.
pub(super) fn tag(response: &[u8]) -> Tag {
    let tag = response.get(..2).and_then(|tag| tag.try_into().ok());
    match tag.map(u16::from_be_bytes) {
        Some(NO_SESSIONS | SESSIONS) => Tag::Tpm2,
        Some(RSP_COMMAND) => Tag::Old,
        _ => Tag::Other,
    }
}
