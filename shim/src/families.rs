//! Metrics as somebody else wrote them: Prometheus' text (`docs/instrumenting/exposition_formats.md` there), read line
//! by line so that texts of many sandboxes become one, and so that a guest can say nothing but what is its own.

use std::collections::BTreeMap;

use agent_protocol::exposition::braced;

/// Families by their name, each with its samples.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Families(BTreeMap<String, Family>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Family {
    help: String,
    kind: String,
    samples: Vec<String>,
}

/// One line of a text, taken apart.
struct Sample<'a> {
    name: &'a str,
    /// What is between the braces.
    labels: &'a str,
    value: &'a str,
}

impl Families {
    /// Reads a text. Lines that are none of the format are left out: one of them would make Prometheus refuse
    /// everything.
    pub fn parse(text: &str) -> Families {
        let mut families = Families::default();
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("# ") {
                families.describe(comment);
            } else if let Some(sample) = Sample::parse(line) {
                let family = families.0.entry(family_of(sample.name).to_owned()).or_default();
                family.samples.push(sample.render(""));
            }
        }
        families
    }

    /// Only the families that begin with one of these, such as `kata_guest_`.
    pub fn only(mut self, prefixes: &[&str]) -> Families {
        self.0
            .retain(|name, _| prefixes.iter().any(|prefix| name.starts_with(prefix)));
        self
    }

    /// The same samples, each with these labels in addition. One that has such a label already is left out: it would
    /// pass for another's.
    pub fn labelled(mut self, labels: &[(&str, &str)]) -> Families {
        let added = braced(labels);
        let added = added.trim_start_matches('{').trim_end_matches('}');
        for family in self.0.values_mut() {
            let parsed = family.samples.iter().filter_map(|sample| Sample::parse(sample));
            let free = parsed.filter(|sample| {
                let names = label_names(sample.labels).unwrap_or_default();
                labels.iter().all(|(name, _)| !names.contains(name))
            });
            family.samples = free.map(|sample| sample.render(added)).collect();
        }
        self
    }

    /// Adds the samples of another text; what a family is stays as it was first said.
    pub fn merge(&mut self, other: Families) {
        for (name, family) in other.0 {
            let known = self.0.entry(name).or_default();
            if known.kind.is_empty() {
                (known.kind, known.help) = (family.kind, family.help);
            }
            known.samples.extend(family.samples);
        }
    }

    /// The text, each family once and in one piece, as the format demands.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (name, family) in self.0.iter().filter(|(_, family)| !family.samples.is_empty()) {
            if !family.help.is_empty() {
                text += &format!("# HELP {name} {}\n", family.help);
            }
            if !family.kind.is_empty() {
                text += &format!("# TYPE {name} {}\n", family.kind);
            }
            for sample in &family.samples {
                text += sample;
                text.push('\n');
            }
        }
        text
    }

    /// `HELP <name> <text>` and `TYPE <name> <kind>`.
    fn describe(&mut self, comment: &str) {
        let mut words = comment.splitn(3, ' ');
        let (Some(what), Some(name), Some(rest)) = (words.next(), words.next(), words.next()) else {
            return;
        };
        if !is_name(name) {
            return;
        }
        match what {
            "HELP" => self.0.entry(name.to_owned()).or_default().help = rest.to_owned(),
            "TYPE" if matches!(rest, "counter" | "gauge" | "histogram" | "untyped") => {
                self.0.entry(name.to_owned()).or_default().kind = rest.to_owned();
            }
            _ => {}
        }
    }
}

impl<'a> Sample<'a> {
    /// `name value` or `name{label="text",...} value`; a time stamp is not taken.
    fn parse(line: &'a str) -> Option<Sample<'a>> {
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = match series.split_once('{') {
            Some((name, rest)) => (name, rest.strip_suffix('}')?),
            None => (series, ""),
        };
        let sound = is_name(name) && value.parse::<f64>().is_ok() && label_names(labels).is_some();
        sound.then_some(Sample { name, labels, value })
    }

    fn render(&self, added: &str) -> String {
        let comma = if added.is_empty() || self.labels.is_empty() {
            ""
        } else {
            ","
        };
        let labels = format!("{added}{comma}{}", self.labels);
        if labels.is_empty() {
            format!("{} {}", self.name, self.value)
        } else {
            format!("{}{{{labels}}} {}", self.name, self.value)
        }
    }
}

/// The family that a sample is of: a histogram's have an ending.
fn family_of(name: &str) -> &str {
    let base = ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|end| name.strip_suffix(end));
    base.filter(|base| base.contains("_histogram_")).unwrap_or(name)
}

fn is_name(name: &str) -> bool {
    let mut letters = name.bytes();
    letters
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == b'_')
}

/// The names in `label="text",...`, where quotes, backslashes and line ends of a text are escaped; `None` for anything
/// else, and for a name that comes twice.
fn label_names(mut rest: &str) -> Option<Vec<&str>> {
    let mut names = Vec::new();
    while !rest.is_empty() {
        let (name, quoted) = rest.split_once("=\"")?;
        let mut escaped = false;
        let end = quoted.bytes().position(|byte| {
            let ends = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            ends
        });
        let after = quoted.get(end? + 1..)?;
        rest = match after.strip_prefix(',') {
            Some(next) if !next.is_empty() => next,
            None if after.is_empty() => "",
            _ => return None,
        };
        if !is_name(name) || names.contains(&name) {
            return None;
        }
        names.push(name);
    }
    Some(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_sandboxes_become_one_text_with_each_family_once() {
        let text = "# HELP kata_guest_load Load.\n# TYPE kata_guest_load gauge\nkata_guest_load{item=\"load1\"} 0.5\n";
        let mut all = Families::default();
        for (id, pod) in [("a", "web"), ("b", "db")] {
            all.merge(Families::parse(text).labelled(&[("sandbox_id", id), ("cri_name", pod)]));
        }
        assert_eq!(
            all.render(),
            "# HELP kata_guest_load Load.\n# TYPE kata_guest_load gauge\n\
             kata_guest_load{sandbox_id=\"a\",cri_name=\"web\",item=\"load1\"} 0.5\n\
             kata_guest_load{sandbox_id=\"b\",cri_name=\"db\",item=\"load1\"} 0.5\n"
        );
    }

    #[test]
    fn a_histogram_stays_in_one_piece() {
        let text = "# TYPE x_histogram_milliseconds histogram\nx_histogram_milliseconds_bucket{le=\"1\"} 1\n\
                    x_histogram_milliseconds_bucket{le=\"+Inf\"} 1\nx_histogram_milliseconds_sum 0.5\n\
                    x_histogram_milliseconds_count 1\n";
        assert_eq!(Families::parse(text).render(), text);
    }

    #[test]
    fn a_guest_speaks_of_nothing_but_itself() {
        let said = "kata_guest_load 1\nkata_hypervisor_fds 7\nkata_guest_load{sandbox_id=\"other\"} 9\n\
                    kata_guest_load{sandbox_id =\"other\"} 9\n# TYPE kata_guest_load summary\n";
        let heard = Families::parse(said).only(&["kata_guest_", "kata_agent_"]);
        assert_eq!(
            heard.labelled(&[("sandbox_id", "own")]).render(),
            "kata_guest_load{sandbox_id=\"own\"} 1\n"
        );
    }

    #[test]
    fn lines_that_are_none_are_left_out() {
        for line in [
            "",
            "no_value",
            "a b",
            "9a 1",
            "a{ 1",
            "a} 1",
            "a{b} 1",
            "a{b=\"c} 1",
            "a{b=\"c\",} 1",
            "a{b=\"c\"d=\"e\"} 1",
            "a{b=\"\\\"} 1",
            "a{b=\"c\"}x{} 1",
            "a{b=\"c\",b=\"d\"} 1",
            "a 1 1700000000000",
        ] {
            assert_eq!(Families::parse(line).render(), "", "{line}");
        }
        for line in [
            "a 1",
            "a{b=\"c\"} +Inf",
            "a{b=\"\\\"}{,\",d=\"\"} 2e9",
            "a{b=\"\\\\\"} NaN",
        ] {
            assert_eq!(Families::parse(line).render(), format!("{line}\n"));
        }
    }
}
