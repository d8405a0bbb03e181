//! `busway manual`: the manual's pages, made from the very definitions that the command line and the file are read by.
//!
//! A page for each command, `busway-run(1)`, and one for the file, `busway.toml(5)`. Packages have them made by the
//! program that they bring, so that no page says what the program does not.

mod file;

use std::fs;
use std::path::{Path, PathBuf};

use clap::builder::StyledStr;
use clap::{Arg, ArgAction, Args, Command, CommandFactory as _};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use super::schema::{self, Section};
use super::{Cli, Failure, serve};
use crate::exit::RUNTIME;

/// What the pages belong to.
const MANUAL: &str = "Busway";
/// Where they are from.
const SOURCE: &str = concat!("busway ", env!("CARGO_PKG_VERSION"));

/// `busway manual`
#[derive(Args, Clone, Debug)]
pub(super) struct ManualArgs {
    /// The folder that the pages are written to
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

pub(super) fn run(args: &ManualArgs) -> Result<(), Failure> {
    for Page { name, text } in pages() {
        let path = args.folder.join(name);
        write(&path, &text)?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    fs::write(path, text).map_err(|error| {
        let error = anyhow::Error::new(error).context(format!("cannot write {}", path.display()));
        Failure::explained(RUNTIME, error)
    })
}

/// One page.
struct Page {
    /// The file's name.
    name: String,
    /// What man(1) shows.
    text: String,
}

fn pages() -> Vec<Page> {
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let mut serving = serve::command()
        .display_name("busway-api-socket")
        .bin_name("busway --api-socket=WHERE");
    serving.build();
    let mut pages = Vec::new();
    add(&mut pages, &top);
    add(&mut pages, &serving);
    pages.push(Page {
        name: "busway.toml.5".to_owned(),
        text: file::page(),
    });
    let names: Vec<String> = pages.iter().map(Page::reference).collect();
    for page in &mut pages {
        page.see_also(&names);
    }
    pages
}

/// The page of a command, and those of the commands below it.
fn add(pages: &mut Vec<Page>, command: &Command) {
    let name = command.get_display_name().unwrap_or(command.get_name());
    pages.push(Page {
        name: format!("{name}.1"),
        text: text(command, name),
    });
    for below in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        add(pages, below);
    }
}

fn text(command: &Command, name: &str) -> String {
    let man = Man::new(command.clone())
        .title(name)
        .source(SOURCE)
        .manual(MANUAL);
    let mut text = Vec::new();
    let mut parts = vec![
        man.render_title(&mut text),
        man.render_name_section(&mut text),
        man.render_synopsis_section(&mut text),
        man.render_description_section(&mut text),
        options(command).to_writer(&mut text),
    ];
    if command.get_subcommands().any(|one| !one.is_hide_set()) {
        parts.push(man.render_subcommands_section(&mut text));
    }
    parts.push(after(command).to_writer(&mut text));
    // Nothing can go wrong in memory.
    debug_assert!(parts.iter().all(Result::is_ok));
    once(&String::from_utf8_lossy(&text))
}

/// The text, in which each part begins with a definition of apostrophes that are straight, with the first alone.
fn once(text: &str) -> String {
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines() {
        if !(line.contains(".ds Aq ") && lines.contains(&line)) {
            lines.push(line);
        }
    }
    lines.join("\n") + "\n"
}

impl Page {
    /// As others refer to it: `busway-run(1)`.
    fn reference(&self) -> String {
        match self.name.rsplit_once('.') {
            Some((name, section)) => format!("{name}({section})"),
            None => self.name.clone(),
        }
    }

    /// Ends the page with the other pages of `names` that are beside, above and below it.
    fn see_also(&mut self, names: &[String]) {
        let own = self.reference();
        let depth = |name: &str| name.matches('-').count();
        let word = |name: &str| name.split(['(', '.']).next().unwrap_or_default().to_owned();
        let is_near = |other: &&String| {
            let (a, b) = (word(&own), word(other));
            let is_family = a.starts_with(&b) || b.starts_with(&format!("{a}-"));
            **other != own && (depth(other) <= 1 || depth(&own) > 0 && is_family)
        };
        let mut roff = Roff::new();
        roff.control("SH", ["SEE ALSO"]);
        let near: Vec<_> = names.iter().filter(is_near).collect();
        for (index, name) in near.iter().enumerate() {
            let (title, section) = name.split_once('(').unwrap_or((name, ""));
            let end = if index + 1 == near.len() { "" } else { "," };
            roff.text([bold(title), roman(format!("({section}{end}"))]);
        }
        // Without what lets apostrophes be straight, which a page says once, and none is here.
        self.text += &roff.to_roff();
    }
}

/// The sections of a command's arguments, under the headings of its help.
fn options(command: &Command) -> Roff {
    let mut headings: Vec<Option<&str>> = Vec::new();
    let shown: Vec<&Arg> = command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set())
        .collect();
    for arg in &shown {
        if !headings.contains(&arg.get_help_heading()) {
            headings.push(arg.get_help_heading());
        }
    }
    headings.sort_by_key(Option::is_some);
    let mut roff = Roff::new();
    for heading in headings {
        let title = heading.unwrap_or("Options").to_uppercase();
        roff.control("SH", [title.as_str()]);
        for arg in &shown {
            if arg.get_help_heading() == heading {
                option(&mut roff, arg);
            }
        }
    }
    roff
}

fn option(roff: &mut Roff, arg: &Arg) {
    let mut head = Vec::new();
    if let Some(short) = arg.get_short() {
        head.push(bold(format!("-{short}")));
    }
    if let Some(long) = arg.get_long() {
        if !head.is_empty() {
            head.push(roman(", "));
        }
        head.push(bold(format!("--{long}")));
    }
    let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
    if takes_value {
        let names = arg.get_value_names().unwrap_or_default();
        if !head.is_empty() {
            head.push(roman(" "));
        }
        head.push(italic(names.join(" ")));
    }
    roff.control("TP", []);
    roff.text(head);
    let help = arg.get_long_help().or_else(|| arg.get_help());
    let help = help.map(StyledStr::to_string).unwrap_or_default();
    match Keys::all().into_iter().find(|keys| keys.help == help) {
        Some(keys) => keys.show(roff),
        None => prose(roff, &help),
    }
    let values = arg.get_possible_values();
    let values: Vec<_> = values.iter().filter(|one| !one.is_hide_set()).collect();
    if takes_value && !values.is_empty() {
        let names: Vec<_> = values.iter().map(|value| value.get_name()).collect();
        roff.control("br", []);
        roff.text([roman(format!("One of: {}", names.join(", ")))]);
    }
}

/// Text as the help has it: a line that is indented stands as it is, all others are filled.
fn prose(roff: &mut Roff, text: &str) {
    let mut stands = false;
    for line in text.lines() {
        let indented = line.starts_with("  ");
        if indented != stands && !line.is_empty() {
            roff.control(if indented { "nf" } else { "fi" }, []);
            stands = indented;
        }
        match line.trim() {
            "" if stands => roff.text([roman("")]),
            "" => roff.control("sp", []),
            _ => roff.text([roman(line)]),
        };
    }
    if stands {
        roff.control("fi", []);
    }
}

/// What stands at the end of a command's help: its examples and its exit status have headings of their own.
fn after(command: &Command) -> Roff {
    let mut roff = Roff::new();
    let text = command
        .get_after_long_help()
        .or_else(|| command.get_after_help())
        .map(StyledStr::to_string)
        .unwrap_or_default();
    let mut paragraphs: Vec<(&str, String)> = Vec::new();
    for line in text.lines() {
        let heading = [("Examples:", "EXAMPLES"), ("Exit status: ", "EXIT STATUS")];
        let heading = heading
            .into_iter()
            .find_map(|(start, title)| Some((title, line.strip_prefix(start)?)));
        match (heading, paragraphs.last_mut()) {
            (Some((title, rest)), _) => paragraphs.push((title, format!("{rest}\n"))),
            (None, Some((_, text))) => *text += &format!("{line}\n"),
            (None, None) => paragraphs.push(("NOTES", format!("{line}\n"))),
        }
    }
    for (title, text) in paragraphs {
        roff.control("SH", [title]);
        prose(&mut roff, text.trim_matches('\n'));
    }
    roff
}

/// The keys of a flag's value, or of a table of the file.
struct Keys {
    /// The flag without its dashes; the table's name.
    name: &'static str,
    /// What it is for, without the keys.
    title: &'static str,
    /// The whole help of the flag.
    help: String,
    /// What can be said, and what it means.
    meanings: Vec<(String, &'static str)>,
    /// What else is to be known.
    notes: &'static str,
}

impl Keys {
    /// Of all sections, in the order of the help.
    fn all() -> Vec<Self> {
        vec![
            Self::of(&schema::FIRMWARE),
            Self::of(&schema::CPUS),
            Self::of(&schema::MEMORY),
            Self::of(&schema::MEMORY_ZONE),
            Self::of(&schema::NUMA),
            Self::of(&schema::DISK),
            Self::of(&schema::NET),
            Self::of(&schema::FS),
            Self::of(&schema::PMEM),
            Self::of(&schema::GENERIC),
            Self::of(&schema::VSOCK),
            Self::of(&schema::TPM),
            Self::of(&schema::RNG),
            Self::of(&schema::SERIAL),
            Self::of(&schema::CONSOLE),
            Self::of(&schema::DEVICE),
            Self::of(&schema::PLATFORM),
            Self::of(&schema::LANDLOCK_RULES),
            Self::of(&schema::API_SOCKET),
        ]
    }

    fn of<T>(section: &'static Section<T>) -> Self {
        let title = section.summary.split(": ").next();
        Self {
            name: section.name,
            title: title.unwrap_or(section.summary),
            help: section.help(),
            meanings: section.meanings(),
            notes: section.notes(),
        }
    }

    fn show(&self, roff: &mut Roff) {
        roff.text([roman(format!("{}.", self.title))]);
        roff.control("RS", []);
        for (said, means) in &self.meanings {
            roff.control("TP", []);
            roff.text([bold(said)]);
            let lines: Vec<_> = means.lines().map(str::trim).collect();
            roff.text([roman(lines.join(" "))]);
        }
        roff.control("RE", []);
        if !self.notes.is_empty() {
            roff.control("IP", []);
            prose(roff, self.notes);
        }
    }
}

#[cfg(test)]
mod tests;
