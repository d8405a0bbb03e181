use super::*;

fn page(name: &str) -> String {
    let mut pages = pages().into_iter();
    pages.find(|page| page.name == name).unwrap().text
}

#[test]
fn every_command_has_a_page_and_every_argument_of_it_is_there() {
    fn look(command: &Command, count: &mut usize) {
        let name = command.get_display_name().unwrap_or(command.get_name());
        let text = page(&format!("{name}.1"));
        *count += 1;
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            if let Some(long) = arg.get_long() {
                let long = format!("\\-\\-{}", long.replace('-', "\\-"));
                assert!(text.contains(&long), "{name}: {long}");
            }
        }
        for below in command.get_subcommands().filter(|one| !one.is_hide_set()) {
            look(below, count);
        }
    }
    let mut top = Cli::command().disable_help_subcommand(true);
    top.build();
    let mut count = 0;
    look(&top, &mut count);
    // That of the process without a command, and the file's.
    assert_eq!(pages().len(), count + 2);
    assert!(count > 20, "{count}");
}

#[test]
fn the_page_of_the_file_has_every_word_of_it() {
    let text = page("busway.toml.5");
    for word in schema::TOP {
        let table = [format!(".SH [{word}]\n"), format!(".SH [[{word}]]\n")];
        let there = table.iter().any(|table| text.contains(table));
        assert!(there || text.contains(&format!("\\fB{word}\\fR")), "{word}");
    }
    for keys in Keys::all()
        .iter()
        .filter(|keys| schema::TOP.contains(&keys.name))
    {
        for (said, _) in &keys.meanings {
            let said = said.replace('-', "\\-");
            assert!(text.contains(&said), "{}: {said}", keys.name);
        }
    }
}

#[test]
fn a_page_begins_with_its_title_and_ends_with_others() {
    for Page { name, text } in pages() {
        let title = text.lines().find(|line| line.starts_with(".TH"));
        assert!(title.is_some_and(|title| title.contains(SOURCE)), "{name}");
        assert_eq!(text.matches("\n.TH").count(), 1, "{name}");
        assert!(text.contains(".SH \"SEE ALSO\"\n"), "{name}");
    }
}
