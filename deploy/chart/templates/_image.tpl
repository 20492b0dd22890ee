{{- /* The name of an image, "operator" or "installer": below the one registry, unless a value gives it another one. Of (dict "chart" $ "name" <which> "given" <value>). */}}
{{- define "sandpod.image" }}
{{- $digest := index .chart.Values.digests .name }}
{{- $version := ternary (printf "@%s" $digest) (printf ":%s" .chart.Chart.AppVersion) (not (empty $digest)) }}
{{- default (printf "%s/%s%s" .chart.Values.registry .name $version) .given }}
{{- end }}
