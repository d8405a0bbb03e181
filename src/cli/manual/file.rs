//! `busway.toml(5)`: the file of a VM.

use clap::CommandFactory as _;
use clap_mangen::roff::{Roff, bold, roman};

use super::super::{Cli, schema};
use super::{Keys, MANUAL, SOURCE, prose};

/// What can be there several times: a list of tables.
const LISTS: [&str; 9] = [
    "memory-zone",
    "numa",
    "disk",
    "net",
    "fs",
    "pmem",
    "generic-vhost-user",
    "device",
    "landlock-rules",
];

/// A file that is tried like all of them.
const EXAMPLE: &str = include_str!("../../../examples/nic-and-disk.toml");

pub(super) fn page() -> String {
    let mut roff = Roff::new();
    roff.control("TH", ["busway.toml", "5", "", SOURCE, MANUAL]);
    roff.control("SH", ["NAME"]);
    roff.text([roman(
        "busway.toml - a virtual machine of Busway's, as a file",
    )]);
    roff.control("SH", ["SYNOPSIS"]);
    roff.text([roman("/etc/busway/NAME.toml, for busway@NAME.service")]);
    roff.control("br", []);
    roff.text([bold("busway run --config"), roman(" FILE")]);
    roff.control("SH", ["DESCRIPTION"]);
    prose(
        &mut roff,
        "The file describes one virtual machine in TOML. It has the words of busway-run(1): a table for each flag, \
         such as [cpus], and for what can be there several times one of a list of tables, such as [[disk]]. \
         A string in a table's place is what would stand after the flag: serial = \"tty\". What a flag says too, the \
         flag decides, key by key; devices of flags come after those of the file.\n\n\
         Sizes are bytes, or strings with K, M, G or T after the number. Switches are true and false. A key that is \
         not known is an error, which names the line.",
    );
    top(&mut roff);
    let tables = Keys::all();
    let tables = tables
        .iter()
        .filter(|keys| schema::TOP.contains(&keys.name));
    for keys in tables {
        let title = match LISTS.contains(&keys.name) {
            true => format!("[[{}]]", keys.name),
            false => format!("[{}]", keys.name),
        };
        roff.control("SH", [title.as_str()]);
        keys.show(&mut roff);
    }
    roff.control("SH", ["EXAMPLES"]);
    roff.control("nf", []);
    for line in EXAMPLE.lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff.control("SH", ["FILES"]);
    for (path, what) in [
        ("/etc/busway/NAME.toml", "the VM of busway@NAME.service"),
        (
            "/var/lib/busway/NAME",
            "what that VM may write: images, variables of its firmware",
        ),
        (
            "/run/busway-vm/NAME/api",
            "its control socket, for busway-ctl(1)",
        ),
        ("/usr/share/doc/busway/examples", "files to begin with"),
    ] {
        roff.control("TP", []);
        roff.text([bold(path)]);
        roff.text([roman(what)]);
    }
    roff.render()
}

/// What stands above the tables, with the help of the flags that say it.
fn top(roff: &mut Roff) {
    roff.control("SH", ["TOP OF THE FILE"]);
    let top = Cli::command();
    let flags = top.find_subcommand("run").into_iter();
    for flag in flags.flat_map(|run| run.get_arguments()) {
        let name = flag.get_id().as_str();
        if !schema::TOP.contains(&name) || Keys::all().iter().any(|keys| keys.name == name) {
            continue;
        }
        let help = flag.get_long_help().or_else(|| flag.get_help());
        roff.control("TP", []);
        roff.text([bold(name)]);
        prose(roff, &help.map(ToString::to_string).unwrap_or_default());
    }
}
