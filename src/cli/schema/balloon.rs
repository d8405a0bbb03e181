//! The words of `--balloon`.

use super::{Key, Section};
use crate::config::BalloonConfig;

/// `--balloon`
pub(in crate::cli) static BALLOON: Section<BalloonConfig> = Section {
    name: "balloon",
    summary: "Memory that the guest gives back (balloon): size=SIZE[,deflate_on_oom=on|off]…",
    words: &[],
    notes: "\
Beside an assigned device nothing goes back, for devices reach all of RAM by DMA.
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
    },
    required: &[],
    bare: None,
    single: false,
    details: &[],
};
