//! The words of `--balloon`.

use super::{Key, Section};
use crate::cli::value::{Reason, Value};
use crate::config::{BalloonConfig, BesideDevices};

/// `--balloon`
pub(in crate::cli) static BALLOON: Section<BalloonConfig> = Section {
    name: "balloon",
    summary: "Memory that the guest gives back (balloon): size=SIZE[,deflate_on_oom=on|off]…",
    words: &[],
    notes: "\
Beside an assigned device nothing goes back, for devices reach all of RAM by DMA,
unless vfio=remap says otherwise. What free_page_reporting=on reports stays then, too.
`busway ctl resize --balloon SIZE` changes the size.",
    blank: BalloonConfig::default,
    keys: keys! {
        "size" { "SIZE": "what it has at first, a multiple of 4K [0]" }
            |balloon, value| balloon.size = value.size()?;
        "deflate_on_oom" { "on|off": "the guest takes some of it before it ends programs for want of\n\
                 memory [off]" }
            |balloon, value| balloon.deflate_on_oom = value.switch()?;
        "free_page_reporting" { "on|off": "what becomes free in the guest goes back to the host [off]" }
            |balloon, value| balloon.free_page_reporting = value.switch()?;
        "vfio" { "keep": "beside assigned devices it stays with the VM [keep]",
                 "remap": "RAM is mapped for devices by blocks; those that the balloon has whole are\n\
                           unmapped and go back" }
            |balloon, value| balloon.vfio = beside(value)?;
        "block" { "SIZE": "with vfio=remap: a block, 2M to 128M [the least of which RAM has 16384]" }
            |balloon, value| balloon.block = Some(value.size()?);
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};

/// What becomes of a balloon beside assigned devices.
const BESIDE: &[&str] = &["keep", "remap"];

fn beside(value: &Value) -> Result<BesideDevices, Reason> {
    match value {
        Value::Text(word) if word.eq_ignore_ascii_case("keep") => Ok(BesideDevices::Keep),
        Value::Text(word) if word.eq_ignore_ascii_case("remap") => Ok(BesideDevices::Remap),
        other => Err(Reason::Word {
            value: other.to_string(),
            words: BESIDE,
        }),
    }
}
