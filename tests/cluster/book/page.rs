//! A page of documentation, taken apart: files to save, excerpts, and commands with what they print.

/// What a fenced block is.
#[derive(Debug, PartialEq, Eq)]
pub enum Block {
    /// A file to be saved under the name that its fence has.
    File { name: String, text: String },
    /// A piece of YAML to be read only.
    Excerpt(String),
    /// Commands.
    Session(Vec<Command>),
}

/// A command of a session.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Command {
    /// Its line on the page, from 1.
    pub line: usize,
    /// It is for root on a node: its prompt is `#`, not `$`.
    pub on_node: bool,
    /// What is typed.
    pub text: String,
    /// What it prints, if the page says so: `...` is anything within a line, and alone any number of lines.
    pub output: Vec<String>,
}

/// A block and where it is.
#[derive(Debug, PartialEq, Eq)]
pub struct Placed {
    /// The heading that it is under.
    pub heading: String,
    /// Its first line on the page, from 1.
    pub line: usize,
    pub block: Block,
}

/// All fenced blocks of a page in Markdown, in order.
pub fn blocks(page: &str) -> Vec<Placed> {
    let mut found = Vec::new();
    let (mut heading, mut lines) = (String::new(), page.lines().enumerate());
    while let Some((number, line)) = lines.next() {
        if line.starts_with('#') {
            heading = line.trim_start_matches('#').trim().to_owned();
        } else if let Some(kind) = line.strip_prefix("```") {
            let inside: Vec<&str> = lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| *line != "```")
                .collect();
            let line = number + 2;
            found.push(Placed {
                heading: heading.clone(),
                line,
                block: block(kind, line, &inside),
            });
        }
    }
    found
}

fn block(kind: &str, line: usize, inside: &[&str]) -> Block {
    let text = inside.iter().map(|line| format!("{line}\n")).collect();
    match kind.split_once(' ') {
        Some((_, name)) => Block::File {
            name: name.to_owned(),
            text,
        },
        None if kind == "console" => Block::Session(session(line, inside)),
        None => Block::Excerpt(text),
    }
}

fn session(first: usize, lines: &[&str]) -> Vec<Command> {
    let mut commands: Vec<Command> = Vec::new();
    for (number, line) in lines.iter().enumerate() {
        let prompt = line.split_at_checked(2);
        match (prompt, commands.last_mut()) {
            (Some((prompt @ ("$ " | "# "), text)), _) => commands.push(Command {
                line: first + number,
                on_node: prompt == "# ",
                text: text.to_owned(),
                output: Vec::new(),
            }),
            (_, Some(command)) => command.output.push((*line).to_owned()),
            (_, None) => {}
        }
    }
    commands
}

/// Whether a command printed what the page says. How columns are spaced does not count.
pub fn printed(expected: &[String], actual: &str) -> bool {
    let spaced = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let expected: Vec<String> = expected.iter().map(|line| spaced(line)).collect();
    let actual: Vec<String> = actual.trim_end().lines().map(spaced).collect();
    lines_match(&expected, &actual)
}

fn lines_match(expected: &[String], actual: &[String]) -> bool {
    match expected.split_first() {
        None => actual.is_empty(),
        Some((any, rest)) if any == "..." => (0..=actual.len()).any(|skipped| lines_match(rest, &actual[skipped..])),
        Some((line, rest)) => actual
            .split_first()
            .is_some_and(|(first, others)| line_matches(line, first) && lines_match(rest, others)),
    }
}

fn line_matches(expected: &str, actual: &str) -> bool {
    let Some((start, rest)) = expected.split_once("...") else {
        return expected == actual;
    };
    let Some(mut left) = actual.strip_prefix(start) else {
        return false;
    };
    let (middle, end) = rest
        .rsplit_once("...")
        .map_or(("", rest), |(middle, end)| (middle, end));
    for part in middle.split("...") {
        match left.split_once(part) {
            Some((_, after)) => left = after,
            None => return false,
        }
    }
    left.ends_with(end)
}

/// The examples that show how pages are read: the suite runs them before it believes a page.
pub fn examples() -> bool {
    let page = "# One\n```yaml a.yaml\nkind: A\n```\n## Two\n```console\n$ ls\na.yaml  b-...\n...\n# id\n```\n```yaml\nb: 1\n```\n";
    let command = |line, on_node, text: &str, output: &[&str]| Command {
        line,
        on_node,
        text: text.into(),
        output: output.iter().map(|line| (*line).into()).collect(),
    };
    let commands = vec![
        command(7, false, "ls", &["a.yaml  b-...", "..."]),
        command(10, true, "id", &[]),
    ];
    let placed = |heading: &str, line, block| Placed {
        heading: heading.into(),
        line,
        block,
    };
    let expected = [
        placed(
            "One",
            3,
            Block::File {
                name: "a.yaml".into(),
                text: "kind: A\n".into(),
            },
        ),
        placed("Two", 7, Block::Session(commands)),
        placed("Two", 13, Block::Excerpt("b: 1\n".into())),
    ];
    let lines = ["a ... c ...".to_owned(), "...".to_owned()];
    blocks(page) == expected
        && printed(&lines, "a  b  c d\nand\nmore\n")
        && printed(&lines, "a b c d")
        && !printed(&lines, "a b d")
        && !printed(&lines[..1], "a b c d\nmore")
}
